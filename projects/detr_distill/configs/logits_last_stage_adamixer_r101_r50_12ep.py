from .logits_adamixer_r101_r50_12ep import (
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    teacher,
    train,
)

model.objectives[0].update(progressive=False)
train.output_dir = "./output/logits_last_stage_adamixer_r101_r50_12ep"
