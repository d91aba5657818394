"""DETRDistill, D3ETR and feature distillation: a frozen detector teaches another one."""
