"""`pretrain`, `finetune` and `demo`: the loop, its checkpoints, and what a run leaves in its folder."""
