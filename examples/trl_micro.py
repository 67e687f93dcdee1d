"""Routing in a TRL script: GRPO on the bundled micro world, a few steps on a CPU.

    python examples/trl_micro.py            # about a minute; needs the extra `trl`

The three lines that routing takes are marked. The reward is the micro world's, which can be fooled.
"""

import argparse

from vgrout.integrations.trl import RoutedGRPOTrainer, Routing  # 1: before trl, so that its telemetry stays off

# isort: split
from datasets import Dataset
from trl import GRPOConfig

from vgrout.envs.micro_env import MicroEnv
from vgrout.envs.sandbox import Sandbox
from vgrout.models.load import load_model
from vgrout.types import Rollout


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--out", default="runs/trl_micro")
    args = parser.parse_args()
    with Sandbox() as sandbox:
        env = MicroEnv(sandbox)
        prompts = [
            env.prompt(id, family="train", hinted=True, draw=0) for id in env.problems("train")[: 4 * args.steps]
        ]
        asked = {prompt.user: prompt for prompt in prompts}

        def reward(prompts, completions, **_):
            texts = [(p[-1]["content"], c[0]["content"]) for p, c in zip(prompts, completions, strict=True)]
            return [g.reward for g in env.grade([Rollout("", asked[p], c, (), (), 0) for p, c in texts])]

        model, tokenizer = load_model("micro")
        trainer = RoutedGRPOTrainer(  # 2: instead of GRPOTrainer
            routing=Routing(pairs="micro"),  # 3
            model=model,
            processing_class=tokenizer,
            reward_funcs=reward,
            train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": p.user}]} for p in prompts]),
            args=GRPOConfig(
                output_dir=args.out,
                max_steps=args.steps,
                per_device_train_batch_size=32,
                num_generations=8,
                max_completion_length=64,
                learning_rate=2e-3,
                beta=0.05,
                loss_type="dr_grpo",
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                logging_steps=1,
                report_to="none",
                save_strategy="no",
            ),
        )
        trainer.train()
    trainer.save_model()  # both blocks, without the base model
    said = trainer.router.export(f"{args.out}/peft", force=True)
    print(f"live in {args.out}/peft: {said['live']}; the quarantine is ablated")


if __name__ == "__main__":
    main()
