from .logits_adamixer_r101_r50_12ep import (
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    teacher,
    train,
)

model.objectives[0].update(negative_boxes=False)
train.output_dir = "./output/logits_positives_adamixer_r101_r50_12ep"
