from .d3etr_conditional_detr_r101_r50_12ep import (
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    teacher,
    train,
)

model.student.transformer.decoder.num_layers = 4
train.output_dir = "./output/d3etr_conditional_detr_r101_r50_enc6_dec4_12ep"
