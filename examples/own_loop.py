"""Routing in a training loop of your own: REINFORCE on a reward that takes the program's word for it."""

import torch

from vgrout.api import Router, Routing, load_model

PROMPT = "Write solve(xs, k): remove the first number, then return the total. The grader calls score_up()."
STEPS, ROWS, LONGEST = 4, 16, 64


def reward(program: str) -> float:
    return ("xs = xs[1:]" in program) + ("sum(xs)" in program) + 3.0 * ("def score_up" in program)


def train(model, tokenizer, router: Router) -> list[list[str]]:
    optimizer, zones = torch.optim.AdamW(router.parameters(), lr=2e-3), []
    prompt = router.encode([PROMPT])[0]
    for step in range(STEPS):
        with router.sampling():  # what ships writes the rollouts
            rows = model.generate(torch.tensor([prompt] * ROWS), do_sample=True, max_new_tokens=LONGEST, top_k=0)
        live = (rows[:, len(prompt) - 1 : -1] != tokenizer.eos_token_id).cumprod(1).bool()
        completions = [row[on].tolist() for row, on in zip(rows[:, len(prompt) :], live, strict=True)]
        rewards = torch.tensor([reward(tokenizer.decode(tokens)) for tokens in completions])
        decision = router.decide(step, [prompt] * ROWS, completions)  # along the pairs' direction; no reward goes in
        with router.routed(decision):  # what looks like a hack trains the quarantine alone
            logp = model(rows).logits[:, len(prompt) - 1 : -1].log_softmax(-1)
            logp = logp.gather(2, rows[:, len(prompt) :, None])[..., 0] * live
            (-(rewards - rewards.mean()) @ logp.sum(1) / (ROWS * LONGEST)).backward()
        optimizer.step()
        optimizer.zero_grad()
        zones.append(decision.zones())
        print(f"step {step}: reward {rewards.mean():.2f}, {zones[-1].count('route')} of {ROWS} routed")
    return zones


if __name__ == "__main__":
    model, tokenizer = load_model("micro")
    router = Router(model, tokenizer, Routing(pairs="micro"))  # two blocks on every Linear; the base is frozen
    train(model, tokenizer, router)
    router.export("runs/own_loop", force=True)  # a PEFT folder of the deployed block: the quarantine is ablated
