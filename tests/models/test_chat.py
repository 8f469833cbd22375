"""Chats are written by the model's own template, and prompts of text begin as the model's tokenizer says."""

import json
import shutil
from dataclasses import replace

import pytest
from golden_cases import FOLDER, golden_model

import jclt
from jclt.errors import UserError
from jclt.models.chat import ChatTemplate, check_messages

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}\n    {% if message.role not in ['user', 'assistant'] %}"
    "{{ raise_exception('no role ' ~ message.role) }}{% endif %}\n"
    "{{ message.role }} : {{ message['content'] | trim }} \n{% endfor %}\n"
    "{%- if add_generation_prompt %}assistant :{% endif %}"
)
ASKED = [{"role": "user", "content": " word7 word8 "}]
BEGUN = [*ASKED, {"role": "assistant", "content": "word9 "}]


@pytest.fixture
def folder(tmp_path):
    """A model whose tokenizer adds <bos> to text, with a template that writes it too."""
    shutil.copytree(FOLDER / "llama3", tmp_path / "model")
    path = tmp_path / "model" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": TEMPLATE}))
    return tmp_path / "model"


def test_a_chat_is_written_up_to_the_answer_and_begins_once(folder):
    model = jclt.load_model(folder)
    assert model.render(ASKED) == "<bos>user : word7 word8 \nassistant :"
    assert model.render(BEGUN) == "<bos>user : word7 word8 \nassistant : word9"
    assert model.encode(ASKED) == [1, 3, 3, 7, 8, 3, 3]  # 3 is <unk>
    assert model.encode("word7 word8") == [1, 7, 8]
    logits, _ = jclt.run(model, ASKED)
    assert logits.shape[0] == 7
    answer = jclt.generate(model, ASKED, 3, stop_tokens=())
    ids = jclt.generate(model, model.encode(ASKED), 3, stop_tokens=())
    assert answer.split() == model.tokenizer.decode(ids[7:].tolist()).split()


@pytest.mark.parametrize("spread", ["{{ messages[-1].content }}", "{{ messages[-1].content | trim }}"])
def test_a_begun_answer_keeps_the_spaces_that_the_template_keeps(spread):
    model = golden_model("llama3")
    model = replace(model, tokenizer=replace(model.tokenizer, template=ChatTemplate(f"a {spread} b")))
    assert model.render(BEGUN) == ("a word9" if "trim" in spread else "a word9 ")


def test_templates_of_all_places(folder, tmp_path):
    (folder / "chat_template.jinja").write_text("jinja: {{ messages[0].content }}")
    assert jclt.load_model(folder).render(ASKED) == "jinja:  word7 word8 "
    (folder / "chat_template.jinja").unlink()
    path = folder / "tokenizer_config.json"
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "{{ eos_token }}"}]
    settings = json.loads(path.read_text()) | {"eos_token": {"content": "<eos>"}, "chat_template": named}
    path.write_text(json.dumps(settings))
    model = jclt.load_model(folder)
    assert model.render(ASKED) == "<eos>"
    jclt.save_model(model, tmp_path / "saved")
    assert jclt.load_model(tmp_path / "saved").render(ASKED) == "<eos>"


def get_refusal(model, messages) -> str:
    with pytest.raises(UserError) as error:
        jclt.run(model, messages)
    return str(error.value)


def test_wrong_chats_are_refused_in_one_line(folder):
    name, model = str(folder), jclt.load_model(folder)
    missing = f"model {name}: its chat template refuses the messages (no role tool)"
    assert get_refusal(model, [{"role": "tool", "content": "x"}]) == missing
    assert get_refusal(model, [{"role": "user"}]) == "prompt: 'content' of message 0 is None, expected text"
    assert get_refusal(model, [*ASKED, {"content": "x"}]) == "prompt: 'role' of message 1 is None, expected text"
    with pytest.raises(UserError, match="message 1 is 'x', expected its 'role' and 'content'"):
        check_messages([*ASKED, "x"])
    without = replace(model, tokenizer=replace(model.tokenizer, template=None))
    assert (
        get_refusal(without, ASKED)
        == f"model {name}: has no chat template, expected text or token ids instead of messages"
    )
    broken = replace(model, tokenizer=replace(model.tokenizer, template=ChatTemplate("{% for %}")))
    assert "its chat template refuses the messages (Expected an expression" in get_refusal(broken, ASKED)
    unsafe = ChatTemplate("{{ messages.append(1) }}")
    assert "object is unsafe" in get_refusal(replace(model, tokenizer=replace(model.tokenizer, template=unsafe)), ASKED)
    (folder / "tokenizer_config.json").write_text('{"chat_template": 5}')
    with pytest.raises(UserError, match="tokenizer_config.json: 'chat_template' is 5, expected text"):
        jclt.load_model(folder)
