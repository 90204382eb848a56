import math

import pytest
import torch
from lmi_dist_handler import demo_text
from lmi_dist_handler.demo_text import ASSISTANT, BOS, EOS, SPECIAL_TOKENS, USER, Document


def test_docstrings_carry_dotted_names():
    source = (
        '"""What this module is for, at length."""\nclass A:\n    def f(self):\n        """What this function does, at length."""\n'
    )

    assert demo_text.docstrings(source, "pkg.mod") == [
        Document("pkg.mod", "What this module is for, at length."),
        Document("pkg.mod.A.f", "What this function does, at length."),
    ]


def test_source_of_another_python_gives_nothing():
    assert demo_text.docstrings('print "hello"\n', "old") == []


def test_documents_are_unique_and_in_order():
    documents = demo_text.documents(num_bytes=40_000)

    assert len({document.text for document in documents}) == len(documents)
    assert documents == demo_text.documents(num_bytes=40_000)


def test_no_document_is_learned_and_held_out():
    documents = [Document(str(i), f"text {i}") for i in range(100)]

    learned, held_out = demo_text.split(documents, seed=0)

    assert len(held_out) == 5
    assert sorted(learned + held_out, key=lambda document: int(document.title)) == documents


@pytest.fixture(scope="module")
def tokenizer():
    return demo_text.train_tokenizer(["to be or not to be, that is the question"] * 3, vocab_size=300)


def test_tokenizer_fills_its_vocabulary(tokenizer):
    assert tokenizer.get_vocab_size() == 300
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == [0, 1, 2, 3]


@pytest.mark.parametrize("text", ["not to be", "Größe: 5 µm", "日本語 🙂\n\ttab"])
def test_tokenizer_gives_any_text_back(tokenizer, text):
    encoding = tokenizer.encode(text)

    assert encoding.ids[0] == tokenizer.token_to_id(BOS)
    assert tokenizer.decode(encoding.ids) == text


def test_every_other_document_answers_a_user(tokenizer):
    row = demo_text.encode(tokenizer, [Document("a", "to be"), Document("b", "or not")])

    text = tokenizer.decode(row.tolist(), skip_special_tokens=False)
    assert text == f"{BOS}to be{EOS}{BOS}{USER}b{ASSISTANT}or not{EOS}"


def test_bigram_probabilities_sum_to_one():
    learned = torch.randint(6, (200,), generator=torch.Generator().manual_seed(0))

    for previous in range(7):  # 6 was never seen
        losses = [demo_text.bigram_loss(learned, torch.tensor([previous, token]), vocab_size=7) for token in range(7)]
        assert sum(math.exp(-loss) for loss in losses) == pytest.approx(1.0)


def test_bigram_learns_what_follows():
    learned = torch.tensor([0, 1, 2] * 100)

    assert demo_text.bigram_loss(learned, torch.tensor([0, 1, 2, 0]), vocab_size=3) < 0.02
