"""Replay in a Trainer of your own: the mixture is its data set, the callback checks that it is read in order."""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from forgetcast import Pool, ReplayPlan, load_task
from forgetcast.lm import ReplayCallback, ReplayMixture

name, task, pool, plan_file, output = sys.argv[1:]
model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
new, old, plan = load_task(task), Pool.load(pool), ReplayPlan.load(plan_file)
mixture = ReplayMixture(new, tokenizer, steps=8, batch_size=4, max_length=96, plan=plan, pool=old)
arguments = TrainingArguments(
    output_dir=output,
    max_steps=mixture.steps,
    per_device_train_batch_size=4,
    train_sampling_strategy="sequential",
    remove_unused_columns=False,
)
trainer = Trainer(model, arguments, mixture.collate, mixture, callbacks=[ReplayCallback(mixture)])
trainer.train()
trainer.save_model(output)
