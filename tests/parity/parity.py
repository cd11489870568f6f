# SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
# SPDX-License-Identifier: Apache-2.0
"""Compares Tessera's MoE layer with the MoE blocks of `transformers` on the CPU: forward, input and weight gradients.

For each model a small block with random weights is built from the model's own class. Its loss is sum(y * dy) plus the
balance losses of the preset; inputs, weights, outputs and gradients go to a file, which the driver reads, runs through
moe_layer with the preset's types, and compares. In `f64` the block's own casts to float32 are widened to float64, so
that both sides compute in double throughout; in `f32` it runs as published.

    parity.py --driver build/tests/parity/tessera_parity_driver [--only deepseek] [--keep DIR]

Needs torch (its CPU build suffices) and transformers 5, for example in a virtual environment. Exit status: 0 all as
expected, 1 a difference, 77 torch or transformers is missing (the reason is printed).
"""

import argparse
import contextlib
import importlib
import os
import subprocess
import sys
import tempfile
import types

SKIPPED = 77
TOLERANCE = {"f64": 1e-9, "f32": 1e-5}
SEQUENCES = [0, 9, 10, 31, 48]  # packed sequences; ranks split the tokens between them
RANKS = [1, 2, 4]

try:
    import torch
    import transformers
except Exception as reason:  # a broken installation raises more than ImportError
    print(f"skipped: torch and transformers are needed, importing them failed: {reason}")
    sys.exit(SKIPPED)

if int(transformers.__version__.split(".")[0]) < 5:
    print(f"skipped: transformers 5 is needed, which stacks the weights of experts; this is {transformers.__version__}")
    sys.exit(SKIPPED)

torch.set_num_threads(1)


# --- Reference blocks -------------------------------------------------------------------------------------------------

NUM_EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 16, 4, 32, 24
SIZES = dict(hidden_size=HIDDEN, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4, vocab_size=16)


class Model:
    """A model's block: where its class is, how it is configured, and what its parts are called."""

    def __init__(self, name, module, block, config, *, gate="gate", sizes, layout="out_in", shared=None, **values):
        self.name, self.module_name, self.block, self.config = name, module, block, config
        self.gate, self.sizes, self.layout, self.shared, self.values = gate, sizes, layout, shared, values

    def build(self, **overrides):
        package = f"transformers.models.{self.module_name}"
        self.module = importlib.import_module(f"{package}.modeling_{self.module_name}")
        configuration = importlib.import_module(f"{package}.configuration_{self.module_name}")
        config = getattr(configuration, self.config)(**{**SIZES, **self.sizes, **overrides})
        config._experts_implementation = "eager"
        return getattr(self.module, self.block)(config)


def models():
    experts = dict(num_experts=NUM_EXPERTS, num_experts_per_tok=TOP_K, moe_intermediate_size=INTERMEDIATE)
    deepseek = dict(n_routed_experts=NUM_EXPERTS, num_experts_per_tok=TOP_K, moe_intermediate_size=INTERMEDIATE)
    local = dict(num_local_experts=NUM_EXPERTS, intermediate_size=INTERMEDIATE)
    return [
        Model("mixtral", "mixtral", "MixtralSparseMoeBlock", "MixtralConfig",
              sizes=dict(local, num_experts_per_tok=2), switch_loss=0.5),
        Model("qwen3_moe", "qwen3_moe", "Qwen3MoeSparseMoeBlock", "Qwen3MoeConfig",
              sizes=dict(experts, norm_topk_prob=True), switch_loss=0.25),
        Model("olmoe", "olmoe", "OlmoeSparseMoeBlock", "OlmoeConfig",
              sizes=dict(num_experts=NUM_EXPERTS, num_experts_per_tok=TOP_K, intermediate_size=INTERMEDIATE,
                         norm_topk_prob=False), switch_loss=0.25, z_loss=0.125),
        Model("deepseek_v2_lite", "deepseek_v2", "DeepseekV2Moe", "DeepseekV2Config", shared="shared_experts",
              sizes=dict(deepseek, n_shared_experts=2, topk_method="greedy", routed_scaling_factor=1.0),
              sequence_loss=0.5),
        Model("deepseek_v3", "deepseek_v3", "DeepseekV3MoE", "DeepseekV3Config", shared="shared_experts",
              sizes=dict(deepseek, n_shared_experts=1, n_group=4, topk_group=2, routed_scaling_factor=2.5,
                         norm_topk_prob=True), sequence_loss=0.5, groups=4, kept_groups=2, scale=2.5),
        Model("glm4_moe", "glm4_moe", "Glm4MoeMoE", "Glm4MoeConfig", shared="shared_experts",
              sizes=dict(deepseek, n_shared_experts=1, n_group=1, topk_group=1, routed_scaling_factor=2.5,
                         norm_topk_prob=True), sequence_loss=0.5, scale=2.5),
        Model("gpt_oss", "gpt_oss", "GptOssMLP", "GptOssConfig", gate="router", layout="in_out",
              sizes=dict(local, num_experts_per_tok=TOP_K)),
        Model("llama4", "llama4", "Llama4TextMoe", "Llama4TextConfig", gate="router", layout="in_out",
              shared="shared_expert", sizes=dict(local, num_experts_per_tok=1, intermediate_size_mlp=INTERMEDIATE)),
        Model("llama4_top2", "llama4", "Llama4TextMoe", "Llama4TextConfig", gate="router", layout="in_out",
              shared="shared_expert", sizes=dict(local, num_experts_per_tok=2, intermediate_size_mlp=INTERMEDIATE)),
    ]


def randomise(block, seed):
    """Values that spread logits and activations, so that every branch of an activation is taken."""
    generator = torch.Generator().manual_seed(seed)
    scale = {"gate_up_proj": 3.0, "gate_up_proj_bias": 1.0, "down_proj_bias": 1.0, "bias": 0.5}
    with torch.no_grad():
        for name, parameter in sorted(block.named_parameters()):
            leaf = name.split(".")[-1]
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            deviation = scale.get(leaf, 1.5) / (1.0 if leaf.endswith("bias") else HIDDEN**0.5)
            parameter.copy_(values * deviation)
        for name, buffer in block.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator, dtype=torch.float32))
    return generator


@contextlib.contextmanager
def widened(module, active):
    """Inside, float32 means float64 for the code of `module`: its router's casts lose no bits."""
    if not active:
        yield
        return
    proxy = types.ModuleType("torch")
    proxy.__getattr__ = lambda name: getattr(torch, name)
    proxy.float32 = proxy.float = torch.float64
    to_float = torch.Tensor.float
    module.torch, torch.Tensor.float = proxy, torch.Tensor.double
    try:
        yield
    finally:
        module.torch, torch.Tensor.float = torch, to_float


@contextlib.contextmanager
def masking_with(value):
    """Inside, unselected groups are masked with `value` whatever the code says; None leaves the code alone."""
    if value is None:
        yield
        return
    masked_fill = torch.Tensor.masked_fill
    torch.Tensor.masked_fill = lambda tensor, mask, _: masked_fill(tensor, mask, value)
    try:
        yield
    finally:
        torch.Tensor.masked_fill = masked_fill


# --- Balance losses ---------------------------------------------------------------------------------------------------


def balance_losses(model, config_top_k, logits, bias):
    """The balance losses of the preset, on the logits of the gate, with the coefficients of the case."""
    loss = logits.new_zeros(())
    if "switch_loss" in model.values:
        # transformers' function sums over the K choices where ours takes their mean: hence 1 / K.
        function = model.module.load_balancing_loss_func
        loss = loss + model.values["switch_loss"] / config_top_k * function((logits,), NUM_EXPERTS, config_top_k)
    if "z_loss" in model.values:
        loss = loss + model.values["z_loss"] * torch.logsumexp(logits, -1).square().mean()
    if "sequence_loss" in model.values:
        # arXiv 2412.19437, eq 17 to 20; f counts the top K of the unbiased scores.
        scores = logits.sigmoid() if bias is not None else logits.softmax(-1)
        chosen = torch.zeros_like(scores).scatter(1, scores.topk(config_top_k, dim=-1).indices, 1.0)
        parts = []
        for begin, end in zip(SEQUENCES, SEQUENCES[1:]):
            f = chosen[begin:end].mean(0) * NUM_EXPERTS / config_top_k
            p = (scores[begin:end] / scores[begin:end].sum(-1, keepdim=True)).mean(0)
            parts.append((f * p).sum())
        loss = loss + model.values["sequence_loss"] * torch.stack(parts).mean()
    return loss


# --- One case ---------------------------------------------------------------------------------------------------------


def selected_experts(block, model, x):
    """The set of experts of each token, as a mask [T, E]."""
    outputs = getattr(block, model.gate)(x)
    if model.module_name == "llama4":
        return outputs[0] > 0  # scores of unselected experts are sigmoid(-inf)
    return torch.zeros(x.shape[0], NUM_EXPERTS, dtype=torch.bool).scatter(1, outputs[2], True)


def stack_shared(shared, layout, read):
    """The shared expert's projections in the layout of the preset: gate before up."""
    up = torch.cat([read(shared.gate_proj.weight), read(shared.up_proj.weight)], dim=0)
    down = read(shared.down_proj.weight)
    return (up.T, down.T) if layout == "in_out" else (up, down)


def make_case(model, precision, *, negative_scores=False, mask=None):
    """Runs the reference and returns (options, tensors)."""
    dtype = {"f64": torch.float64, "f32": torch.float32}[precision]
    num_tokens = SEQUENCES[-1]
    for seed in range(100):
        block = model.build()
        generator = randomise(block, seed)
        x = torch.randn(num_tokens, HIDDEN, generator=generator, dtype=torch.float32)
        dy = torch.randn(num_tokens, HIDDEN, generator=generator, dtype=torch.float32)
        gate = getattr(block, model.gate)
        bias = getattr(gate, "e_score_correction_bias", None)
        if negative_scores:
            bias.sub_(1.5)  # every biased score is below 0
        block, x, dy = block.to(dtype), x.to(dtype), dy.to(dtype)
        bias = getattr(gate, "e_score_correction_bias", None)
        with torch.no_grad(), widened(model.module, precision == "f64"), masking_with(mask):
            chosen = selected_experts(block, model, x)
            noise = 1.0 + 1e-5 * torch.randn(x.shape, generator=generator, dtype=torch.float32).to(dtype)
            stable = torch.equal(chosen, selected_experts(block, model, x * noise))
        if stable:  # no token so near a tie that rounding decides
            break
    else:
        raise RuntimeError(f"{model.name}: no seed without near ties")

    top_k = int(chosen.sum(-1).max())
    x.requires_grad_(True)
    logits = []
    position = 1 if model.module_name == "llama4" else 0
    hook = gate.register_forward_hook(lambda _, __, out: logits.append(out[position]))
    with widened(model.module, precision == "f64"), masking_with(mask):
        y = block(x.unsqueeze(0) if model.module_name != "llama4" else x)
        y = (y[0] if isinstance(y, tuple) else y).reshape(num_tokens, HIDDEN)
        losses = balance_losses(model, top_k, logits[0], bias)
    hook.remove()
    ((y * dy).sum() + losses).backward()

    tensors = {"x": x, "dy": dy, "y": y, "dx": x.grad, "gate": gate.weight, "gate_grad": gate.weight.grad,
               "losses": losses.reshape(1)}
    if bias is not None:
        tensors["bias"] = bias.to(torch.float32)
    if getattr(gate, "bias", None) is not None:
        tensors["gate_bias"], tensors["gate_bias_grad"] = gate.bias, gate.bias.grad
    for theirs, ours in (("gate_up_proj", "up"), ("down_proj", "down"), ("gate_up_proj_bias", "up_bias"),
                         ("down_proj_bias", "down_bias")):
        if hasattr(block.experts, theirs):
            parameter = getattr(block.experts, theirs)
            tensors[ours], tensors[ours + "_grad"] = parameter, parameter.grad
    num_shared = 0
    if model.shared:
        shared = getattr(block, model.shared)
        num_shared = shared.down_proj.weight.shape[1] // INTERMEDIATE
        tensors["shared_up"], tensors["shared_down"] = stack_shared(shared, model.layout, lambda p: p.data)
        tensors["shared_up_grad"], tensors["shared_down_grad"] = stack_shared(shared, model.layout, lambda p: p.grad)

    options = dict(model=model.name.removesuffix("_top2"), precision=precision, num_experts=NUM_EXPERTS, top_k=top_k,
                   hidden=HIDDEN, intermediate=INTERMEDIATE, num_shared_experts=num_shared, **model.values)
    tensors["sequence_offsets"] = torch.tensor(SEQUENCES, dtype=torch.int32)
    return options, {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def write_case(path, options, tensors):
    """Text lines (`option NAME VALUE`, `tensor NAME DTYPE RANK EXTENTS...`, `end`), then the packed values."""
    names = {torch.float64: "F64", torch.float32: "F32", torch.int32: "I32"}
    with open(path, "wb") as file:
        for name, value in options.items():
            file.write(f"option {name} {value}\n".encode())
        for name, tensor in tensors.items():
            extents = " ".join(str(extent) for extent in tensor.shape)
            file.write(f"tensor {name} {names[tensor.dtype]} {tensor.dim()} {extents}\n".encode())
        file.write(b"end\n")
        for tensor in tensors.values():
            file.write(tensor.numpy().tobytes())


def run_driver(driver, path, ranks, tolerance):
    command = [driver, path, "--ranks", str(ranks), "--tolerance", str(tolerance)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return done.returncode, (done.stdout + done.stderr).strip()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--driver", required=True, help="the built tessera_parity_driver")
    parser.add_argument("--only", default="", help="run the models whose name contains this")
    parser.add_argument("--keep", default="", help="folder for the case files; a temporary one if not given")
    arguments = parser.parse_args()

    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    failures = cases = 0
    with contextlib.ExitStack() as stack:
        folder = arguments.keep or stack.enter_context(tempfile.TemporaryDirectory())
        os.makedirs(folder, exist_ok=True)

        def check(name, case, precision, *, expect_difference=False):
            nonlocal failures, cases
            path = os.path.join(folder, f"{name}_{precision}.parity")
            write_case(path, *case)
            for ranks in [1] if expect_difference else RANKS:
                status, text = run_driver(arguments.driver, path, ranks, TOLERANCE[precision])
                wanted = 1 if expect_difference else 0
                cases += 1
                failures += status != wanted
                verdict = "ok" if status == wanted else "FAILED"
                remark = " (a difference was expected)" if expect_difference else ""
                last_line = text.splitlines()[-1] if text else f"exit status {status}"
                print(f"{verdict:6} {name} {precision} ranks {ranks}{remark}: {last_line}")
                if status != wanted:
                    print(text)

        for model in models():
            if arguments.only in model.name:
                for precision in ("f64", "f32"):
                    check(model.name, make_case(model, precision), precision)
            if model.name == "deepseek_v3" and arguments.only in model.name:
                # Where all biased scores are negative, the value that masks unselected groups decides. DeepSeek's own
                # code and ours mask with -inf; transformers has also masked with 0.0, which lets experts of unselected
                # groups win: with that rule the layers must disagree. As published, whichever rule that is.
                cases_by_rule = {mask: make_case(model, "f64", negative_scores=True, mask=mask)
                                 for mask in (None, float("-inf"), 0.0)}
                check("deepseek_v3_inf_mask", cases_by_rule[float("-inf")], "f64")
                check("deepseek_v3_zero_mask", cases_by_rule[0.0], "f64", expect_difference=True)
                as_published, with_zero = (cases_by_rule[mask][1]["y"] for mask in (None, 0.0))
                check("deepseek_v3_negative_scores", cases_by_rule[None], "f64",
                      expect_difference=torch.equal(as_published, with_zero))
    print(f"{cases - failures} of {cases} comparisons as expected")
    return 1 if failures or not cases else 0


if __name__ == "__main__":
    sys.exit(main())
