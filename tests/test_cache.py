"""The slot cache against the dynamic cache of transformers, row by row."""

from device import torch
from families import make_model
from transformers import DynamicCache, LlamaConfig

from pard_hf.generation.cache import SlotCache, attention_windows
from pard_hf.host import MOST_CONFIGS, cache_layers, layers_by_content

TRASH = -1


def forward(model, cache, ids, positions, num_visible):
    mask = cache.prepare(positions, num_visible)
    with torch.no_grad():
        return model(
            input_ids=ids, attention_mask=mask, position_ids=positions.clamp(min=0), past_key_values=cache
        ).logits


def test_rejected_entries_leave_no_trace():
    """Random texts of different lengths, random wrong proposals, random accepted counts: logits as from scratch."""
    for family in ("llama", "mistral", "gemma3", "gpt2"):
        model = make_model(family)
        texts = torch.randint(3, 99, (4, 60))
        lengths = torch.tensor([1, 5, 9, 14])
        cache = SlotCache(model.config, 64)
        columns = torch.arange(14) - 14 + lengths.unsqueeze(1)
        forward(model, cache, texts.gather(1, columns.clamp(min=0)), columns, 14)
        for _ in range(6):
            new = torch.arange(5) + lengths.unsqueeze(1)
            ids = texts.gather(1, new)
            right = torch.randint(1, 5, (4,))
            ids = torch.where(torch.arange(5) < right.unsqueeze(1), ids, 50)
            logits = forward(model, cache, ids, new, 64)
            for row in range(4):
                end = int(lengths[row] + right[row])
                with torch.no_grad():
                    whole = model(texts[row : row + 1, :end]).logits[0, -1]
                torch.testing.assert_close(logits[row, right[row] - 1], whole, atol=2e-5, rtol=1e-4)
            lengths = lengths + right


def test_buffers_keep_their_addresses():
    """CUDA graphs need fixed addresses."""
    model = make_model("llama")
    cache = SlotCache(model.config, 32)
    ids = torch.randint(3, 99, (2, 6))
    positions = torch.arange(6).expand(2, -1)
    forward(model, cache, ids, positions, 32)
    addresses = [layer.keys.data_ptr() for layer in cache.layers]

    forward(model, cache, ids, positions + 6, 32)

    assert [layer.keys.data_ptr() for layer in cache.layers] == addresses


def test_padding_is_written_where_nothing_reads():
    model = make_model("llama")
    cache = SlotCache(model.config, 16)
    ids = torch.tensor([[7, 7, 5, 6]])

    padded = forward(model, cache, ids, torch.tensor([[TRASH, TRASH, 0, 1]]), 2)

    with torch.no_grad():
        torch.testing.assert_close(padded[:, 2:], model(ids[:, 2:]).logits, atol=1e-5, rtol=1e-5)
    assert padded.isfinite().all()


def test_entries_come_from_and_go_to_a_dynamic_cache():
    model = make_model("llama")
    ids = torch.randint(3, 99, (2, 8))
    theirs = DynamicCache(config=model.config)
    with torch.no_grad():
        expected = model(ids[:, :5], past_key_values=theirs).logits
    ours = SlotCache(model.config, 16)

    ours.load(theirs, torch.arange(5).expand(2, -1))
    logits = forward(model, ours, ids[:, 5:], torch.arange(5, 8).expand(2, -1), 8)
    ours.append_to(theirs, torch.arange(5, 8).expand(2, -1))

    with torch.no_grad():
        torch.testing.assert_close(logits, model(ids).logits[:, 5:], atol=1e-5, rtol=1e-5)
        whole = DynamicCache(config=model.config)
        model(ids, past_key_values=whole)
    assert theirs.get_seq_length() == 8
    torch.testing.assert_close(theirs.layers[1].keys, whole.layers[1].keys, atol=1e-5, rtol=1e-5)
    assert expected.shape[1] == 5


def test_windows_are_those_of_transformers():
    assert attention_windows(make_model("llama").config) == [None, None]
    assert attention_windows(make_model("mistral").config) == [9, 9]
    assert attention_windows(make_model("gemma2").config) == [9, None]


def test_layers_are_kept_of_few_configs():
    """A server that meets many models, or one whose config is changed again and again, keeps a bounded number."""
    for vocab_size in range(100, 100 + 2 * MOST_CONFIGS):
        assert len(cache_layers(LlamaConfig(num_hidden_layers=2, vocab_size=vocab_size))) == 2

    assert len(layers_by_content) <= MOST_CONFIGS
