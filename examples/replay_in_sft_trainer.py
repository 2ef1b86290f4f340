"""Replay in TRL's SFTTrainer: the mixture is its data set, to be left as it is; the callback checks that it was."""

import sys

from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from forgetcast import Pool, ReplayPlan, load_task
from forgetcast.lm import ReplayCallback, ReplayMixture

name, task, pool, plan, output = sys.argv[1:]
new, old, tokenizer = load_task(task), Pool.load(pool), AutoTokenizer.from_pretrained(name)
mixture = ReplayMixture(new, tokenizer, steps=8, batch_size=4, max_length=96, plan=ReplayPlan.load(plan), pool=old)
arguments = SFTConfig(
    output_dir=output,
    max_steps=mixture.steps,
    per_device_train_batch_size=4,
    train_sampling_strategy="sequential",
    dataset_kwargs={"skip_prepare_dataset": True},
    bf16=False,  # as the Trainer's default
)
trainer = SFTTrainer(name, arguments, train_dataset=mixture.dataset(), callbacks=[ReplayCallback(mixture)])
trainer.train()
trainer.save_model(output)
