"""Our models and Hugging Face's compute the same: ./run parity calls this.

out      random models of ours, exported, loaded by transformers: stock architectures, and every kind with its own code
back     what was exported, imported again
in       random models of transformers, imported

For each: logits of 64 random sequences (largest difference over the largest logit), 64 greedy tokens, and the ids of
texts in many scripts. Everything in f32. Prints a table; exit code 1 when a line differs.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile

import torch
import transformers
from safetensors.torch import load_file, save_file
from texts import TEXTS
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = os.path.dirname(os.path.abspath(__file__))
TOKENIZER = os.path.join(HERE, "..", "golden", "tokenizer.json")
TOLERANCE = 2e-4

# Sizes that are odd, different from each other, and head_dim * heads != hidden.
SIZES = "hidden=26 layers=3 q_heads=6 kv_heads=3 head_dim=10 experts=5 top_k=2 expert_ffn=14 dense_ffn=22"
LINEAR = "knock.q=linear knock.k=linear knock.v=linear"
NONE = "knock.v=none"
SOFTMAX = "router=softmax router_bias=false"
LATENT = "qk_norm=false nope_dim=8 rope_dim=6 v_head_dim=12 kv_lora_rank=16"

STOCK = [  # name, architecture, keys of the [model] table
    ("qwen3_moe, linear knocks", "qwen3_moe", f"{SOFTMAX} {LINEAR}"),
    ("qwen3_moe, untied, first layer dense", "qwen3_moe", f"{SOFTMAX} {NONE} dense_layers=1 tie_embeddings=false"),
    ("qwen3_moe, top-k not renormalised, window", "qwen3_moe", f"{SOFTMAX} {NONE} norm_topk_prob=false window=5"),
    ("glm4_moe, linear knocks, no shared expert", "glm4_moe", LINEAR),
    ("glm4_moe, partial RoPE, no QK-norm, shared", "glm4_moe",
     f"{NONE} rope_dim=6 qk_norm=false shared_experts=2 dense_layers=1 routed_scaling_factor=2.5 rope_theta=5000"),
    ("glm4_moe, groups, no bias, mqa", "glm4_moe",
     f"{NONE} experts=6 n_group=3 topk_group=2 router_bias=false attention=mqa tie_embeddings=false"),
    ("qwen3, linear knocks, mha", "qwen3", f"{LINEAR} experts=0 attention=mha"),
    ("qwen3, window", "qwen3", f"{NONE} experts=0 window=7 norm_eps=1e-5"),
    ("deepseek_v3, linear knocks", "deepseek_v3", f"attention=mla {LATENT} {LINEAR}"),
    ("deepseek_v3, query latent, shared, dense first", "deepseek_v3",
     f"attention=mla {LATENT} {LINEAR} q_lora_rank=18 shared_experts=1 dense_layers=1 tie_embeddings=false"),
]

MLP, GATE = "knock.q=mlp knock.k=mlp knock.v=mlp", "knock.q=gate knock.k=linear knock.v=gate"
OWN_CODE = [
    ("gqa, mlp knocks", f"{MLP}"),
    ("mha, gate knocks, window", f"attention=mha {GATE} window=6"),
    ("mqa, linear knocks, partial RoPE, softmax router with bias",
     f"attention=mqa {LINEAR} rope_dim=4 router=softmax shared_experts=1"),
    ("gqa, dense, no RoPE", "experts=0 rope=false qk_norm=false tie_embeddings=false"),
    ("gqa, groups", f"{NONE} experts=6 n_group=3 topk_group=2 routed_scaling_factor=1.5"),
    ("gta, mlp knocks", "attention=gta qk_norm=false rope_dim=4 knock.q=mlp knock.v=mlp"),
    ("mla, linear knocks", f"attention=mla {LATENT} {LINEAR} q_lora_rank=18 norm_eps=1e-5"),
    ("gla2, linear knocks", f"attention=gla2 {LATENT} {LINEAR} window=9"),
    ("moa, mlp knocks", f"attention=moa qk_norm=false attention_experts=5 attention_top_k=2 {MLP}"),
    ("talking heads, mlp knocks", f"attention=talking_heads kv_heads=6 qk_norm=false {MLP}"),
    ("hydra", f"attention=hydra qk_norm=false {NONE}"),
]

HF_SIZES = dict(hidden_size=26, num_hidden_layers=3, num_attention_heads=6, intermediate_size=22, max_position_embeddings=128)
HF_GROUPED = dict(HF_SIZES, num_key_value_heads=3, head_dim=10)
HF_MOE = dict(num_experts_per_tok=2, moe_intermediate_size=14, norm_topk_prob=True)
HF_SIGMOID = dict(HF_MOE, n_routed_experts=6, n_shared_experts=1, routed_scaling_factor=1.5, n_group=3, topk_group=2,
                  first_k_dense_replace=1)
HF_LATENT = dict(HF_SIZES, qk_nope_head_dim=8, qk_rope_head_dim=6, v_head_dim=12, kv_lora_rank=16)
INCOMING = [  # name, class of the configuration, its arguments
    ("Qwen3Moe", "Qwen3MoeConfig", dict(HF_GROUPED, **HF_MOE, num_experts=5, mlp_only_layers=[0])),
    ("Qwen3", "Qwen3Config", dict(HF_GROUPED, tie_word_embeddings=True, rms_norm_eps=1e-5)),
    ("Glm4Moe", "Glm4MoeConfig", dict(HF_GROUPED, **HF_SIGMOID, use_qk_norm=True, partial_rotary_factor=0.6)),
    ("DeepseekV3, RoPE in pairs", "DeepseekV3Config", dict(HF_LATENT, **HF_SIGMOID, q_lora_rank=18)),
    ("DeepseekV3, RoPE in halves", "DeepseekV3Config",
     dict(HF_LATENT, **HF_SIGMOID, q_lora_rank=None, rope_interleave=False)),
]


def run(*command):
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {result.stderr.strip()}")


class Parity:
    def __init__(self, programs, folder):
        self.programs, self.folder = programs, folder
        self.failed = self.lines = 0
        self.inputs = self.path("inputs.safetensors")
        generator = torch.Generator().manual_seed(7)
        self.tokens = torch.randint(0, 700, (64, 24), generator=generator)
        self.prompt = torch.randint(0, 700, (5,), generator=generator)
        texts = {f"text.{i}": torch.tensor(list(t.encode()), dtype=torch.uint8) for i, t in enumerate(TEXTS)}
        save_file({"tokens": self.tokens, "prompt": self.prompt, **texts}, self.inputs)

    def path(self, *names):
        return os.path.join(self.folder, *names)

    def program(self, name, *arguments):
        run(os.path.join(self.programs, name), *arguments)

    def make(self, keys, seed):
        """A random model of ours."""
        model = self.path("model")
        shutil.rmtree(model, ignore_errors=True)
        overrides = [f"--model.{key}" for key in f"{SIZES} {keys}".split()]
        self.program("tests/parity_model", "make", model, str(seed), *overrides)
        return model

    def ours(self, model):
        """Logits, greedy tokens and ids of texts, by our code."""
        out = self.path("outputs.safetensors")
        self.program("tests/parity_model", "run", model, self.inputs, out)
        return load_file(out)

    def theirs(self, folder, **options):
        """The same by transformers."""
        if not options:  # the grouped product that transformers would choose needs sizes that are multiples of 4
            options = {"experts_implementation": "eager"}
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
        options.pop("experts_implementation", None)
        model.generation_config.eos_token_id = None
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        with torch.no_grad():
            logits = model(self.tokens).logits
            text = model.generate(self.prompt[None], attention_mask=torch.ones_like(self.prompt)[None],
                                  max_new_tokens=64, do_sample=False)
        out = {"logits": logits, "greedy": text[0, len(self.prompt):]}
        for i, sample in enumerate(TEXTS):
            out[f"ids.{i}"] = torch.tensor(tokenizer(sample)["input_ids"])
        return out, model

    def compare(self, name, ours, theirs):
        largest = theirs["logits"].abs().max().item()
        difference = (ours["logits"] - theirs["logits"]).abs().max().item() / largest
        greedy = torch.equal(ours["greedy"], theirs["greedy"])
        ids = all(torch.equal(ours[f"ids.{i}"], theirs[f"ids.{i}"]) for i in range(len(TEXTS)))
        good = difference <= TOLERANCE and greedy and ids
        self.lines += 1
        self.failed += not good
        words = ["greedy text equal" if greedy else "GREEDY TEXT DIFFERS", "ids equal" if ids else "IDS DIFFER"]
        print(f"{'ok  ' if good else 'FAIL'} {name:62} {difference:8.1e} of {largest:5.2f}, {', '.join(words)}", flush=True)

    def check(self, name, action):
        try:
            action()
        except Exception as error:  # the other lines are still worth having
            self.lines += 1
            self.failed += 1
            print(f"FAIL {name:62} {type(error).__name__}: {str(error).splitlines()[0][:200]}", flush=True)

    def stock(self, name, architecture, keys, seed):
        model, folder, back = self.make(keys, seed), self.path("export"), self.path("back")
        self.program("examples/export", model, "--to", folder)
        ours = self.ours(model)
        theirs, loaded = self.theirs(folder)
        assert loaded.config.model_type == architecture, f"{loaded.config.model_type} is not {architecture}"
        self.compare(f"out   {name}", ours, theirs)
        shutil.rmtree(back, ignore_errors=True)
        self.program("examples/import", folder, back)
        self.compare(f"back  {name}", self.ours(back), ours)

    def own_code(self, name, keys, seed):
        model, folder = self.make(keys, seed), self.path("knock", f"model{seed}")
        os.makedirs(self.path("knock"), exist_ok=True)
        self.program("examples/export", model, "--to", folder, "--format", "knock-hf")
        ours = self.ours(model)
        theirs, loaded = self.theirs(folder, trust_remote_code=True)
        self.compare(f"out   knock: {name}", ours, theirs)
        self.left_padding(loaded)

    def left_padding(self, model):
        """A shorter sequence beside a longer one is generated as it is alone."""
        alone = model.generate(self.tokens[:1, :9], max_new_tokens=8, do_sample=False, pad_token_id=0)
        mask = torch.ones(2, 14, dtype=torch.long)
        mask[0, :5] = 0
        tokens = torch.zeros(2, 14, dtype=torch.long)
        tokens[0, 5:], tokens[1] = self.tokens[0, :9], self.tokens[1, :14]
        both = model.generate(tokens, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
        assert torch.equal(both[0, 14:], alone[0, 9:]), "left padding changes what is generated"

    def incoming(self, name, kind, arguments, seed):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(vocab_size=703, **arguments))
        with torch.no_grad():
            for key, tensor in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
                if "inv_freq" in key:
                    continue
                if key.endswith("bias"):
                    tensor.copy_(0.2 * torch.randn_like(tensor))
                elif tensor.dim() == 1:
                    tensor.copy_(1 + 0.3 * torch.randn_like(tensor))
                else:
                    tensor.copy_(torch.randn_like(tensor) * 1.5 / tensor.shape[-1] ** 0.5)
        folder, back = self.path("theirs"), self.path("back")
        for old in (folder, back):
            shutil.rmtree(old, ignore_errors=True)
        model.save_pretrained(folder, max_shard_size="20KB")
        transformers.PreTrainedTokenizerFast(tokenizer_file=TOKENIZER).save_pretrained(folder)
        theirs, _ = self.theirs(folder)
        self.program("examples/import", folder, back)
        self.compare(f"in    {name}", self.ours(back), theirs)
        shutil.rmtree(back)
        knocks = ["--knock.k=linear", "--knock.v=linear" if kind == "DeepseekV3Config" else "--knock.v=mlp"]
        self.program("examples/import", folder, back, *knocks)
        self.compare(f"in    {name}, with knocks", self.ours(back), theirs)


def main():
    parser = argparse.ArgumentParser(description="Compares our models with Hugging Face's.")
    parser.add_argument("programs", help="the build folder")
    parser.add_argument("--only", default="", help="lines whose name has this word")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(2)
    print(f"transformers {transformers.__version__}, torch {torch.__version__}; tolerance {TOLERANCE} of the largest logit")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_HOME"] = os.path.join(folder, "cache")
        parity = Parity(arguments.programs, folder)
        groups = [("out", parity.stock, STOCK), ("knock", parity.own_code, OWN_CODE), ("in", parity.incoming, INCOMING)]
        for group, action, cases in groups:
            for seed, (name, *rest) in enumerate(cases):
                if arguments.only in f"{group} {name}":
                    parity.check(f"{group:5} {name}", lambda: action(name, *rest, seed))
    print(f"{parity.lines - parity.failed} passed, {parity.failed} failed")
    sys.exit(parity.failed > 0 or parity.lines == 0)


if __name__ == "__main__":
    main()
