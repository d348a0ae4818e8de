"""The neck and the classifier of a head."""

import torch

from fusionreid.heads import Head


def test_neck_normalises_over_the_batch_and_its_bias_is_frozen_at_zero() -> None:
    head, feature = Head(8, 5).double(), 3 * torch.randn(16, 8, dtype=torch.double) + 2
    normed, logits = head(feature)
    torch.testing.assert_close(normed.mean(0), torch.zeros(8, dtype=torch.double))
    torch.testing.assert_close(normed, (feature - feature.mean(0)) / (feature.var(0, correction=0) + 1e-5).sqrt())
    torch.testing.assert_close(logits, normed @ head.classifier.weight.T)
    assert not head.norm.bias.requires_grad
    assert head.norm.bias.count_nonzero() == 0
    assert head.norm.weight.requires_grad
    assert head.classifier.bias is None


def test_classifier_starts_small() -> None:
    weight = Head(1000, 1000).classifier.weight
    assert 0.00099 < weight.std() < 0.00101
    assert weight.mean().abs() < 1e-5


def test_without_neck_the_classifier_sees_the_feature() -> None:
    head, feature = Head(8, 5, neck=False), torch.randn(1, 8)
    normed, logits = head(feature)
    assert normed is feature
    torch.testing.assert_close(logits, feature @ head.classifier.weight.T)
    assert [name for name, _ in head.named_parameters()] == ["classifier.weight"]


def test_cosines_do_not_depend_on_any_length() -> None:
    head, feature = Head(8, 5, neck=False, cosines=True), torch.randn(3, 8)
    _, logits = head(feature)
    expected = torch.nn.functional.cosine_similarity(feature[:, None], head.classifier.weight[None], dim=2)
    torch.testing.assert_close(logits, expected)
