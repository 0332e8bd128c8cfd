"""A circuit built by hand, so that every figure is known in advance, and identities on random weights."""

import pytest
import torch

from spd_lens import SPDConfig, SPDError, decompose, diagnostics, find_sites
from spd_lens.diagnostics import attention, copying, diagnose, intervene, match, positional_alignment, read_circuit
from spd_lens.tasks import induction
from tests import zoo

CLASSES = [False, True] if zoo.HookedTransformer is not None else [True]
SPECIAL, LENGTH, WIDTH, SPARE = 7, 8, 17, 4  # tokens 0 … 6 and s; residual stream: 8 for tokens, 8 for positions, 1 for "I follow s"
POSITION, FLAG = 8, 16
SHARP = 40.0 * WIDTH**0.5  # 40 in score units: attention is one-hot in float32
SITES = ("blocks.*.attn.W_[QKV]",)


def sequences(many=600, seed=0):  # by default more than are run at once
    """Tokens, positions and answers; s never comes first, where it could attend to itself alone."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(SPECIAL, (many, LENGTH), generator=generator)
    s1, rows = torch.randint(1, LENGTH - 2, (many,), generator=generator), torch.arange(many)
    tokens[rows, s1] = tokens[:, -1] = SPECIAL
    return tokens, {"s1": s1, "m": s1 + 1, "s2": torch.full_like(s1, LENGTH - 1)}, tokens[rows, s1 + 1]


def plain(bridge, **changes):
    shape = dict(n_heads=1, d_model=WIDTH, d_head=WIDTH, d_vocab=SPECIAL + 1, n_ctx=LENGTH, attn_only=True, normalization_type=None)
    return (zoo.native if bridge else zoo.hooked)(**{**shape, **changes})


def parameter(model, name):
    """`(parameter, transposed)` of either class."""
    own = dict(model.named_parameters())
    if name in own:
        return own[name], False
    _, layer, _, matrix = name.split(".")
    found = [p for n, p in own.items() if f"layers.{layer}." in n and f".{matrix[2:].lower()}._original" in n and n.endswith("weight")]
    assert len(found) == 1
    return found[0], True


def rank_ones(pairs):
    """`V [17, n]` and `U [n, 17]` that send direction i to direction j with the strength given."""
    V, U = torch.zeros(WIDTH, len(pairs)), torch.zeros(len(pairs), WIDTH)
    for c, (i, j, strength) in enumerate(pairs):
        V[i, c], U[c, j] = 1.0, strength
    return V, U


def circuit_by_hand(copy=1.0):
    """Site → its rank-one parts. Q0 at position i asks for i - 1; V0 flags s; Q1 of s asks for the flag; V1 copies tokens."""
    return {
        "blocks.0.attn.W_Q": [(POSITION + i, i - 1, SHARP) for i in range(1, LENGTH)],
        "blocks.0.attn.W_K": [(POSITION + j, j, 1.0) for j in range(LENGTH - 1)],
        "blocks.0.attn.W_V": [(SPECIAL, 0, 1.0)],
        "blocks.1.attn.W_Q": [(SPECIAL, 0, SHARP)],
        "blocks.1.attn.W_K": [(FLAG, 0, 1.0)],
        "blocks.1.attn.W_V": [(t, t, copy) for t in range(SPECIAL)],
    }


def built(bridge=CLASSES[0], copy=1.0):
    """The model of that circuit, and its decomposition with spare subcomponents that are never active. A gate is on where its
    subcomponent reads anything."""
    model, parts = plain(bridge), circuit_by_hand(copy)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        outside = [n for n, p in model.named_parameters() if p.shape in ((SPECIAL + 1, WIDTH), (WIDTH, SPECIAL + 1))]
        embed, positions, unembed = (dict(model.named_parameters())[name] for name in outside)
        embed[:, : SPECIAL + 1] = torch.eye(SPECIAL + 1)
        positions[:, POSITION:FLAG] = torch.eye(LENGTH)
        (unembed if unembed.shape[0] == SPECIAL + 1 else unembed.T)[:, : SPECIAL + 1] = torch.eye(SPECIAL + 1)
        writes = {"blocks.0.attn.W_O": [(0, FLAG, 1.0)], "blocks.1.attn.W_O": [(t, t, 20.0) for t in range(SPECIAL)]}
        for name, pairs in {**parts, **writes}.items():
            V, U = rank_ones(pairs)
            weight, transposed = parameter(model, name)
            weight.copy_(((V @ U).T if transposed else V @ U).view_as(weight))
        config = SPDConfig(sites=SITES, steps=0, subcomponents=WIDTH, importance="scalar", gate_width=1)
        d = decompose(model, sequences(8)[0], config, progress=False)
        for name, pairs in parts.items():
            V, U = rank_ones(pairs)
            used, c, gate = len(pairs), d.components[name], d.gates[name]
            c.V.data = torch.cat([V, torch.full((WIDTH, SPARE), -0.1)], 1)  # reads nothing but negative numbers
            c.U.data = torch.cat([U, torch.zeros(SPARE, WIDTH)])
            gate.alive, gate.scale = torch.ones(used + SPARE), torch.ones(used + SPARE)
            gate.w1.data, gate.w2.data = torch.full((used + SPARE, 1), 10.0), torch.ones(used + SPARE, 1)
            gate.b1.data, gate.b2.data = torch.zeros(used + SPARE, 1), torch.zeros(used + SPARE)
    return d


@pytest.fixture(scope="module", params=CLASSES)
def ideal(request):
    return read_circuit(built(request.param), *sequences(), SPECIAL)


def test_the_ideal_circuit_is_read_as_it_was_built(ideal):
    assert ideal.correct.all()
    assert {n: len(c) for n, c in ideal.alive.items()} == {n: len(p) for n, p in circuit_by_hand().items()}
    often = ideal.often()
    assert often["s1"]["V0"] == often["m"]["K1"] == often["s2"]["Q1"] == [0]
    assert often["m"]["V0"] == often["s1"]["K1"] == often["m"]["Q1"] == [] and often["m"]["V1"] == []  # a token has 1/7 of the sequences
    assert ideal.often(share=0.05)["m"]["V1"] == list(range(7)) and often["s2"]["Q0"] == [6]


def test_previous_token(ideal):
    found = positional_alignment(ideal)
    wanted = 40.0 * torch.diag(torch.ones(LENGTH - 1), -1)
    wanted[-1] = 0.0  # the last position holds s alone, which is no m
    assert torch.allclose(found.form.sum((0, 1)), wanted, atol=1e-4) and torch.allclose(found.original_form, wanted, atol=1e-4)
    assert found.picks_s1 == found.picks_s1_original == 1 and found.correlation == pytest.approx(1)
    table = found.table()
    for row in ("original", "Q0×K0"):
        assert table.loc[row].tolist() == pytest.approx([1.0, 40.0, 1.0])
    s1, rows = ideal.positions["s1"], len(ideal.positions["s1"].unique())
    assert found.original_contrast == pytest.approx(40.0)
    for j in found.keys:  # each answers for one position: one row of the form, and the contrast of the sequences with s there
        share = float((s1 == j).float().mean())
        assert float(found.share[j]) == pytest.approx(share, abs=1e-5)
        assert table.loc[f"Q0×K0.{j}", "off by one"] == pytest.approx((1 / rows) if (s1 == j).any() else 0.0)
        assert table.loc[f"Q0.{j}×K0.{j}", "share of contrast"] == pytest.approx(share, abs=1e-5)
        other = (j + 1) % 7
        assert table.loc[f"Q0.{other}×K0.{j}"].tolist() == pytest.approx([0.0, 0.0, 0.0])


def test_match(ideal):
    found = match(ideal)
    assert found.picks_m == found.picks_m_original == 1 and found.correlation == pytest.approx(1, abs=1e-5)
    assert found.cosine.tolist() == pytest.approx([1.0]) and found.rank_by_cosine.tolist() == found.rank_by_projection.tolist() == [1]


def test_match_fails_where_k1_reads_something_else():
    """K1 is made to read positions: it picks the last key, and what layer 0 writes for s is nothing to it."""
    d = built()
    with torch.no_grad():
        d.components["blocks.1.attn.W_K"].V[:, 0] = 0.0
        d.components["blocks.1.attn.W_K"].V[POSITION + 1 : FLAG, 0] = torch.arange(1.0, LENGTH)
    found = match(read_circuit(d, *sequences(), SPECIAL))
    assert found.picks_m == 0 and found.picks_m_original == 1 and abs(found.correlation) < 0.5
    assert found.cosine.tolist() == [0.0]


def test_copying(ideal):
    found = copying(ideal)
    for kind in ("active", "original"):
        assert found.own_logit_largest[kind] == 1 and found.eigenvalues[kind] == pytest.approx(1)
    assert found.effective_rank == pytest.approx(7)  # seven equal singular values


def test_copying_of_a_circuit_that_suppresses_tokens():
    circuit = read_circuit(built(copy=-1.0), *sequences(), SPECIAL)
    found = copying(circuit)
    assert found.own_logit_largest == {"active": 0.0, "original": 0.0}
    assert found.eigenvalues == pytest.approx({"active": -1.0, "original": -1.0}) and not circuit.correct.any()


def test_copying_counts_active_subcomponents_alone():
    d = built()
    with torch.no_grad():
        d.gates["blocks.1.attn.W_V"].w2[:3] = 0.0  # three are never active
    found = copying(read_circuit(d, *sequences(), SPECIAL))
    assert found.values == [3, 4, 5, 6] and found.own_logit_largest == pytest.approx({"active": 4 / 7, "original": 1.0})


def test_attention_under_hard_masks(ideal):
    for figures in attention(ideal).values():
        assert figures == pytest.approx({"original": 1.0, "hard": 1.0}, abs=1e-5)
    d = built()
    with torch.no_grad():
        d.gates["blocks.0.attn.W_Q"].w2.zero_()  # none is active: m attends to all alike, and so does s2
    circuit = read_circuit(d, *sequences(), SPECIAL)
    found = attention(circuit)
    assert found["m→s1"]["original"] == pytest.approx(1.0, abs=1e-5)
    assert found["m→s1"]["hard"] == pytest.approx(float((1 / (circuit.positions["m"] + 1.0)).mean()), abs=1e-5)


def test_claims(ideal):
    found = intervene(ideal, torch.Generator().manual_seed(0), draws=3)
    assert found.accuracy == 1 and [claim.name for claim in found.claims] == list(diagnostics.MECHANISMS)
    sizes = {"previous token": 14, "flag": 1, "match": 2, "copy": 7, "layer 0": 15, "layer 1": 9, "everything": 24}
    for claim in found.claims:
        assert claim.size == sizes[claim.name] and claim.accuracy_without < 0.6, claim.name
        assert claim.others == 24 - claim.size and claim.idle == 6 * SPARE
        assert all(figure == 1 for figure in claim.idle_accuracies)
        assert len(claim.control_accuracies) == (0 if claim.size > claim.others else 3), claim.name
        assert len(claim.idle_accuracies) == (1 if claim.size == claim.idle else 3)  # one choice of 24 from 24
    assert found["previous token"].subcomponents == {f"blocks.0.attn.W_{m}": list(range(7)) for m in "QK"}
    assert found["previous token"].note == "14 needed, 10 other active: no control" and not found["copy"].note
    assert found["everything"].note == "24 needed, 0 other active: no control; never-active: only 1 different draw of 24 from 24"
    assert found.table().loc["everything"].isna()["without other active"]
    with pytest.raises(SPDError, match=r"no claim 'machen' was tested; nearest: match"):
        found["machen"]
    with pytest.raises(SPDError, match="draws was given as 0"):
        intervene(ideal, torch.Generator(), draws=0)


def test_a_claim_cuts_exactly_what_it_names():
    """One token's copier alone is active: without it that token's sequences fail and no others."""
    d = built()
    with torch.no_grad():
        for gate in d.gates.values():
            gate.w2.zero_()
        d.gates["blocks.1.attn.W_V"].w2[3] = 1.0
    circuit = read_circuit(d, *sequences(), SPECIAL)
    found = intervene(circuit, torch.Generator(), draws=100, mechanisms={"copier": ["blocks.1.attn.W_V"]})["copier"]
    assert found.subcomponents == {"blocks.1.attn.W_V": [3]} and found.others == 0 and len(found.idle_accuracies) == found.idle == 47
    assert found.accuracy_without == pytest.approx(float((circuit.answers != 3).float().mean()))
    assert found.idle_accuracies.count(1.0) >= 6 * SPARE  # the spare ones, and positions that are never asked for
    assert min(found.idle_accuracies) < 0.5  # never active and yet needed: the control shows it


def test_draws_are_the_generators_and_nothing_active_is_nothing_cut(ideal):
    first, second = (intervene(ideal, torch.Generator().manual_seed(5), draws=2).table() for _ in range(2))
    assert first.equals(second)
    d = built()
    with torch.no_grad():
        for gate in d.gates.values():
            gate.w2.zero_()
    found = diagnose(d, *sequences(), SPECIAL, draws=1)
    assert all(claim.accuracy_without == 1 and "nothing was cut" in claim.note for claim in found.interventions.claims)
    assert not any(claim.control_accuracies or claim.idle_accuracies for claim in found.interventions.claims)
    assert found.match.picks_m == found.alignment.picks_s1 == found.copying.own_logit_largest["active"] == 0  # a tie picks nothing
    assert found.alignment.table().loc["Q0×K0", "off by one"] == 0
    assert repr(found)


def test_off_by_one_sees_what_the_query_sees():
    form = torch.tensor([[9.0, 9.0, 9.0], [4.0, 1.0, 9.0], [2.0, 1.0, 3.0]])  # row 0 is not asked for, column 2 is hidden from row 1
    assert diagnostics.off_by_one(form, torch.tensor([1, 2])) == pytest.approx((0.5, ((4 - 1) + (1 - 2.5)) / 2))
    assert diagnostics.off_by_one(torch.ones(3, 3), torch.tensor([1, 2])) == (0.0, 0.0)


@pytest.mark.parametrize("bridge", CLASSES)
def test_biases_belong_to_the_original_and_to_no_pair(bridge):
    model = plain(bridge)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(20)  # biases too, so that attention shows whether they are there
    d, tokens = _untrained(model), sequences(8)[0]
    circuit = read_circuit(d, *sequences(8), SPECIAL)  # compares the scores' softmax with the model's attention
    query, key = (d.sites[f"blocks.0.attn.W_{m}"] for m in "QK")
    assert query.bias.abs().max() > 0.5 and key.bias.abs().max() > 0.5
    i, j = int(circuit.positions["m"][0]), 1
    x = circuit.x_query[tokens[:, i] != SPECIAL][:, i].mean(0)
    placed = tokens[:1].clone()
    placed[0, j] = SPECIAL
    with torch.no_grad():
        answering = d.trace(placed).inputs[key.name][0, j] @ key.weight + key.bias
        wanted = float((x @ query.weight + query.bias) @ answering) / WIDTH**0.5
    assert float(positional_alignment(circuit).original_form[i, j]) == pytest.approx(wanted, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("bridge", CLASSES)
def test_identities_on_random_weights(bridge):
    """All pairs, the deltas and nothing else make the original scores, forms and contrast; shortformer positions included."""
    model = induction.build_target(0, bridge)
    data = induction.sequences(40, torch.Generator().manual_seed(0))
    config = induction.config(steps=0, subcomponents=WIDTH + 3, gate_bias=3.0, init="random")
    d = decompose(model, data.tokens, config, progress=False)
    circuit = read_circuit(d, data.tokens, data.positions, data.answers, induction.SPECIAL)
    sites, components = d.sites, d.components
    with torch.no_grad():
        x, pattern = d.trace(data.tokens).inputs, model.run_with_cache(data.tokens)[1]["blocks.0.attn.hook_pattern"][:, 0]
        q, k = "blocks.0.attn.W_Q", "blocks.0.attn.W_K"
        m, s1, rows = data.positions["m"], data.positions["s1"], torch.arange(40)
        at_m, W_q, W_k = x[q][rows, m], sites[q].weight, sites[k].weight
        VU_k = components[k].V @ components[k].U
        rest = torch.einsum("nd,njd->nj", at_m @ components[q].delta(W_q), x[k] @ W_k)
        rest = rest + torch.einsum("nd,njd->nj", at_m @ components[q].V @ components[q].U, x[k] @ (W_k - VU_k))
        assert rest.abs().max() > 0.1  # random initialisation: the deltas matter
        scores = circuit.pair_scores(0) + rest / 4
        assert torch.allclose(scores, circuit.scores[0], atol=1e-4)
        visible = torch.arange(64) <= m[:, None]
        assert torch.allclose(scores.masked_fill(~visible, -torch.inf).softmax(-1), pattern[rows, m], atol=1e-5)

        found = positional_alignment(circuit)
        by_hand = [
            float(own[s1[n]] - own[[j for j in range(m[n] + 1) if j != s1[n]]].mean()) for n, own in enumerate(circuit.pair_scores(0))
        ]
        assert float(found.contrast.sum()) == pytest.approx(sum(by_hand) / 40, abs=1e-5)
        seen = [(circuit.pair_scores(0)[n, : m[n] + 1], circuit.scores[0][n, : m[n] + 1]) for n in range(40)]
        pearson = [float(torch.corrcoef(torch.stack(two))[0, 1]) for two in seen]
        assert found.correlation == pytest.approx(sum(pearson) / 40, abs=1e-4)
        assert found.picks_s1 == pytest.approx(sum(int(two[0].argmax()) == int(s1[n]) for n, two in enumerate(seen)) / 40)
        i, j = int(m[0]), 5  # one entry of the form, from single sequences
        usual = [x[q][n, i] for n in range(40) if data.tokens[n, i] != induction.SPECIAL]
        placed = data.tokens[:1].clone()
        placed[0, j] = induction.SPECIAL
        x_j, x_i = d.trace(placed).inputs[k][0, j], torch.stack(usual).mean(0)
        assert float(found.form.sum((0, 1))[i, j]) == pytest.approx(
            float(x_i @ components[q].V @ components[q].U @ (x_j @ VU_k)) / 4, abs=1e-4
        )
        assert float(found.original_form[i, j]) == pytest.approx(float((x_i @ W_q) @ (x_j @ W_k)) / 4, abs=1e-4)

        written = d.trace(torch.tensor([[induction.SPECIAL]])).inputs["blocks.0.attn.W_V"][0, 0] @ sites["blocks.0.attn.W_V"].weight
        written = written @ find_sites(model, "blocks.0.attn.W_O")["blocks.0.attn.W_O"].weight
        cosines = torch.cosine_similarity(written, components["blocks.1.attn.W_K"].V.T).abs()
        assert torch.allclose(match(circuit).cosine, cosines, atol=1e-5)


@pytest.mark.parametrize("bridge", CLASSES)
def test_copying_against_the_whole_matrix(bridge):
    """The eigenvalues of the small product are those of the map from tokens to logits."""
    model = induction.build_target(1, bridge)
    data = induction.sequences(4, torch.Generator().manual_seed(0))
    d = decompose(model, data.tokens, induction.config(steps=0, gate_bias=3.0, init="svd"), progress=False)
    found = copying(read_circuit(d, data.tokens, data.positions, data.answers, induction.SPECIAL))
    with torch.no_grad():
        W = d.sites["blocks.1.attn.W_V"].weight @ find_sites(model, "blocks.1.attn.W_O")["blocks.1.attn.W_O"].weight
        M = (model.W_E @ W @ model.W_U).double()
    spectrum = torch.linalg.eigvals(M)
    assert found.eigenvalues["original"] == pytest.approx(float(spectrum.sum().real / spectrum.abs().sum()), abs=1e-4)
    assert found.eigenvalues["active"] == pytest.approx(found.eigenvalues["original"], abs=1e-4)
    assert found.own_logit_largest["original"] == pytest.approx(float((M.argmax(1) == torch.arange(128))[:127].float().mean()))


def test_diagnose_holds_all_and_its_tables_are_plain(ideal):
    found = diagnose(ideal.decomposition, ideal.tokens, ideal.positions, ideal.answers, SPECIAL, draws=1)
    table = found.table()
    assert list(table.columns) == ["active", "original"] and not table.isna().any().any()
    assert table.loc["attention s2→m (active: hard masks)"].tolist() == pytest.approx([1, 1], abs=1e-5)
    assert list(found.match.table().index) == ["K1.0"] and list(found.copying.table().index) == ["active", "original"]
    for text in ("previous token", "Q0×K0", "K1.0", "without never active"):
        assert text in repr(found)


def test_hooks_and_flags_are_given_back(ideal):
    model = ideal.decomposition.model
    before = model(ideal.tokens, return_type="logits")
    diagnose(ideal.decomposition, ideal.tokens, ideal.positions, ideal.answers, SPECIAL, draws=1)
    assert torch.equal(model(ideal.tokens, return_type="logits"), before) and torch.is_grad_enabled()
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def changed(**changes):
    tokens, positions, answers = sequences(4)
    given = dict(tokens=tokens, positions=positions, answers=answers, special=SPECIAL)
    return {key: changes[key](value) if key in changes else value for key, value in given.items()}


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(positions=lambda p: {"s1": p["s1"]}), r"given for s1; m, s2 is missing"),
        (dict(positions=lambda p: {}), r"given for nothing"),
        (dict(positions=lambda p: {**p, "m": p["m"][:2]}), r"positions\['m'\] was given as \[2\]; give an integer tensor \[4\]"),
        (dict(positions=lambda p: {**p, "m": p["m"].float()}), r"positions\['m'\] was given as"),
        (dict(positions=lambda p: {**p, "m": 3}), r"positions\['m'\] was given as int"),
        (dict(positions=lambda p: {**p, "s2": p["s2"] + 1}), r"runs from 8 to 8; the sequences have the positions 0 … 7"),
        (dict(positions=lambda p: {**p, "m": p["m"] + 1}), r"m has to be s1 \+ 1, and s2 behind it"),
        (dict(positions=lambda p: {**p, "s2": p["s1"]}), r"m has to be s1 \+ 1, and s2 behind it"),
        (dict(positions=lambda p: {**p, "s1": p["s1"] - 1}), r"positions\['s1'\] of sequence 0 is .* the special token was given as 7"),
        (dict(special=lambda s: 3), r"the special token was given as 3"),
        (dict(answers=lambda a: a[:3]), r"answers were given as \[3\]; give an integer tensor \[4\]"),
        (dict(answers=lambda a: a.tolist()), r"answers were given as list"),
        (dict(tokens=lambda t: t.float()), r"token ids are integers"),
    ],
)
def test_what_cannot_be_an_induction_sequence_is_refused(ideal, changes, said):
    with pytest.raises(SPDError, match=said):
        read_circuit(ideal.decomposition, **changed(**changes))


def test_models_that_are_no_such_circuit_are_refused():
    data = sequences(4)
    with pytest.raises(SPDError, match=r"blocks.0.attn.W_V, blocks.1.attn.W_V not decomposed here .*Decompose with sites="):
        read_circuit(_untrained(plain(CLASSES[0]), sites="blocks.*.attn.W_[QK]"), *data, SPECIAL)
    with pytest.raises(SPDError, match=r"2 layers with up to 2 heads"):
        read_circuit(_untrained(plain(CLASSES[0], n_heads=2, d_model=16, d_head=8)), *data, SPECIAL)
    with pytest.raises(SPDError, match=r"3 layers"):
        read_circuit(_untrained(plain(CLASSES[0], n_layers=3)), *data, SPECIAL)
    rotary = plain(CLASSES[0], positional_embedding_type="rotary", rotary_dim=8, d_model=16, d_head=16)
    with torch.no_grad():
        for p in rotary.parameters():
            p.mul_(20)
    with pytest.raises(SPDError, match=r"layer 0 attends otherwise than softmax"):
        read_circuit(_untrained(rotary), *data, SPECIAL)


def _untrained(model, sites=SITES):
    return decompose(model, sequences(4)[0], SPDConfig(sites=sites, steps=0, subcomponents=WIDTH), progress=False)
