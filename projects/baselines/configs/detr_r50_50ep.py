"""The baseline of SMCA's Table 2: focal loss, 300 queries, 50 epochs."""

from .conditional_detr_r50_50ep import dataloader, lr_multiplier, optimizer, train
from .models.conditional_detr_r50 import model as _conditional
from .models.detr_r50 import model

model.backbone.freeze_at = 2
model.num_queries = 300
model.criterion = _conditional.criterion
model.select_box_nums_for_evaluation = 300

train.output_dir = "./output/detr_r50_50ep"
optimizer.params.weight_decay_norm = None  # the paper's weight decay spares nothing
