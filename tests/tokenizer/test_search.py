"""The nearest-neighbour search is a float64 search, whatever product, chunk, thread or autocast it
runs under."""

import pytest
import torch
import torch.nn.functional as F

from tokenizer.quantizers import search, search_on_cpu

PRODUCTS = [search_on_cpu.InFloat32, search_on_cpu.InBFloat16, search_on_cpu.InInt8]
NAN, INF = float("nan"), float("inf")


@pytest.fixture(params=PRODUCTS, ids=lambda product: product.__name__)
def product(request, monkeypatch):
    if request.param is search_on_cpu.InInt8 and torch.backends.quantized.engine not in (
        "x86",
        "fbgemm",
    ):
        pytest.skip("no 8-bit product on this processor")
    monkeypatch.setattr(
        search_on_cpu,
        "choose_products",
        lambda num_rows, book: [request.param, search_on_cpu.InFloat32],
    )
    return request.param


def oracle(rows, book, offsets=None):
    """The first of the least float64 distances, and by how much the next is longer, squared and
    halved."""
    if offsets is None:
        scores = torch.cat([(z.double() - book.double()).square().sum(1)[None] / 2 for z in rows])
    else:
        scores = offsets.double() - rows.double() @ book.double().T
    two = scores.topk(min(2, len(book)), largest=False).values
    gap = (
        two[:, 1] - two[:, 0]
        if len(book) > 1
        else torch.full((len(rows),), INF, dtype=torch.float64)
    )
    return scores.argmin(1), gap


@pytest.mark.parametrize("budget", [1, 5000, search_on_cpu.BUDGET])
@pytest.mark.parametrize(("num_codes", "dim"), [(1, 3), (37, 8), (130, 33), (700, 300)])
def test_it_is_the_search_in_float64(monkeypatch, product, budget, num_codes, dim):
    monkeypatch.setattr(search_on_cpu, "BUDGET", budget)
    rows, book = torch.randn(301, dim), torch.randn(num_codes, dim)
    codes = search.nearest(rows, book)
    assert codes.dtype == torch.int64 and torch.equal(codes, oracle(rows, book)[0])


@pytest.mark.parametrize("dim", [3, 64, 257])
def test_offsets_take_the_place_of_norms(product, dim):
    rows, book, offsets = torch.randn(200, dim), torch.randn(150, dim), torch.randn(150)
    assert torch.equal(search.nearest(rows, book, offsets=offsets), oracle(rows, book, offsets)[0])


def test_a_large_common_mean_costs_no_precision(product):
    rows, book = torch.randn(300, 64), torch.randn(400, 64)
    moved, moved_book = rows + 300, book + 300
    assert torch.equal(search.nearest(moved, moved_book), oracle(moved, moved_book)[0])


def test_near_ties_are_decided_as_in_float64(product):
    """Codes and copies of them one unit of the last place away in one channel."""
    rows, book = torch.randn(300, 40), torch.randn(60, 40)
    copies = book.clone()
    copies[:, 7] = torch.nextafter(copies[:, 7], torch.full((60,), INF))
    book = torch.cat([book, copies])[torch.randperm(120)]
    rows = rows * 0.1 + book[torch.randint(120, (300,))]
    expected, gap = oracle(rows, book)
    assert 0 < (gap < 1e-5).float().mean() and (gap > 0).all()
    assert torch.equal(search.nearest(rows, book), expected)


@pytest.mark.parametrize("num_codes", [3, 17, 129, 500])
@pytest.mark.parametrize("num_rows", [1, 64, 501])
def test_equal_codes_go_to_the_lowest_index(product, num_codes, num_rows):
    order = torch.randperm(4 * num_codes, generator=torch.Generator().manual_seed(num_codes))
    book = torch.randn(num_codes, 33).repeat(4, 1)[order]
    first = torch.stack([(order % num_codes == o % num_codes).nonzero().min() for o in order])
    codes = search.nearest(torch.randn(num_rows, 33), book)
    assert torch.equal(codes, first[codes])


def test_equal_distances_go_to_the_lowest_index(product):
    book = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    assert search.nearest(torch.tensor([[0.0, 0.0], [0.0, 3.0], [3.0, 3.0]]), book).tolist() == [
        1,
        1,
        0,
    ]
    same = torch.ones(9000, 5)  # more candidates than a short list takes
    assert search.nearest(torch.randn(50, 5), same).tolist() == [0] * 50


@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e-12, 1e12, 1e18, 3e37])
def test_lengths_near_the_ends_of_fp32(product, scale):
    rows, book = torch.randn(60, 20) * scale, torch.randn(90, 20) * scale
    expected, gap = oracle(rows, book)
    clear = gap > 1e-6 * gap.median()
    assert clear.float().mean() > (0.5 if scale == 1e-44 else 0.95)
    assert torch.equal(search.nearest(rows, book)[clear], expected[clear])


@pytest.mark.parametrize("scale", [1e19, 1e20, 1e30])
def test_rows_too_long_for_a_square_in_fp32(product, scale):
    rows, book = torch.randn(60, 20), torch.randn(90, 20)
    rows[::2] *= scale
    norms = book.double().square().sum(1) / 2  # a distance would drown in |z|^2
    assert torch.equal(search.nearest(rows, book), oracle(rows, book, norms)[0])
    cosines = F.normalize(rows.double(), dim=1) @ F.normalize(book.double(), dim=1).T
    assert torch.equal(search.nearest(rows, book, "cosine"), cosines.argmax(1))


@pytest.mark.parametrize("scale", [1e-24, 1e-28, 1e-36])
def test_codes_too_short_for_a_square_in_fp32(product, scale):
    rows, book, offsets = torch.randn(300, 64), torch.randn(1000, 64) * scale, torch.zeros(1000)
    assert torch.equal(search.nearest(rows, book, offsets=offsets), oracle(rows, book, offsets)[0])


@pytest.mark.parametrize("value", [0.1, 1 / 3, 123.456])
def test_an_infinite_feature_is_flagged_where_all_codes_are_equal(product, value):
    rows, book = torch.randn(3, 24), torch.randn(128, 24)
    rows[0, 3], rows[1, 3], book[:, 3] = INF, -INF, value
    assert (
        search.nearest(rows, book)[:2].tolist() == [-1, -1] and search.nearest(rows, book)[2] >= 0
    )
    assert search.nearest(rows[:2], torch.full((128, 24), value)).tolist() == [-1, -1]


def test_codes_of_very_different_lengths(product):
    rows = torch.randn(200, 16) * torch.logspace(-20, 15, 200)[:, None]
    book = torch.randn(300, 16) * torch.logspace(-20, 15, 300)[:, None]
    assert torch.equal(search.nearest(rows, book), oracle(rows, book)[0])
    assert (
        search.nearest(torch.zeros(3, 16), book).tolist()
        == oracle(torch.zeros(3, 16), book)[0].tolist()
    )


def test_rows_that_are_not_finite_are_flagged_and_change_no_other(product):
    rows, book = torch.randn(100, 24), torch.randn(80, 24)
    expected = oracle(rows, book)[0]
    rows[3, 5], rows[40], rows[41, 0], rows[99, 1] = NAN, INF, -INF, NAN
    bad = torch.tensor([3, 40, 41, 99])
    expected[bad] = -1
    assert torch.equal(search.nearest(rows, book), expected)


def test_codes_that_are_not_finite_are_never_nearest(product):
    rows, book = torch.randn(100, 24), torch.randn(80, 24)
    good = book.clone()
    book[2, 3], book[50], book[79, 0] = NAN, INF, -INF
    good[[2, 50, 79]] = 1e6
    assert torch.equal(search.nearest(rows, book), oracle(rows, good)[0])
    assert search.nearest(rows[:4], torch.full((5, 24), NAN)).tolist() == [-1] * 4


def test_cosine_is_blind_to_lengths(product):
    rows, book = torch.randn(200, 48), torch.randn(150, 48)
    codes = search.nearest(rows, book, "cosine")
    cosines = F.normalize(rows.double(), dim=1) @ F.normalize(book.double(), dim=1).T
    assert torch.equal(codes, cosines.argmax(1))
    longer = book * torch.tensor([0.5, 4.0]).repeat(75)[:, None]
    assert torch.equal(codes, search.nearest(rows * 8, longer, "cosine"))


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e-13, 1e19, 1e30])
def test_cosine_takes_codes_of_any_length(product, scale):
    rows, book = torch.randn(50, 20), torch.randn(90, 20)
    some = book.clone()
    some[::3] *= scale
    cosines = F.normalize(rows.double(), dim=1) @ F.normalize(book.double(), dim=1).T
    if scale > 1e-38:  # a denormal number has lost what it was scaled from
        assert torch.equal(search.nearest(rows, some, "cosine"), cosines.argmax(1))
    assert (search.nearest(rows, book * scale, "cosine") == cosines.argmax(1)).float().mean() > 0.9


def test_a_search_in_fewer_dimensions_bears_a_large_bias():
    rows, weight, bias = torch.randn(500, 16), torch.randn(128, 16), torch.randn(128) * 1000
    book = torch.randn(300, 16) @ weight.T + bias + 0.1 * torch.randn(300, 128)
    whole = rows.double() @ weight.double().T + bias.double()
    expected = torch.cdist(
        whole, book.double(), compute_mode="donot_use_mm_for_euclid_dist"
    ).argmin(1)
    assert torch.equal(search.LowRank(rows, weight, bias).nearest(book), expected)


def test_leading_dimensions_are_searches_of_their_own(product):
    rows, books, offsets = torch.randn(3, 50, 12), torch.randn(3, 40, 12), torch.randn(3, 40)
    for own in (None, offsets):
        several = search.nearest(rows, books, offsets=own)
        each = [
            search.nearest(rows[i], books[i], offsets=None if own is None else own[i])
            for i in range(3)
        ]
        assert torch.equal(several, torch.stack(each))
    assert search.nearest(rows[0][:0], books[0]).shape == (0,)


def test_threads_autocast_and_reduced_precision_elsewhere_do_not_reach_it(product):
    rows, book = torch.randn(500, 96), torch.randn(900, 96)
    codes = search.nearest(rows, book)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(codes, search.nearest(rows, book))
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    try:
        torch.set_num_threads(threads % 2 + 1)
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(codes, search.nearest(rows, book))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)


def test_what_a_coarse_product_reports_bounds_its_error():
    """And the bound of fp32, on unkind rows: outliers in a channel, codes of very unequal
    lengths."""
    rows = torch.randn(200, 300) * torch.logspace(0, 2, 300)
    codebook = torch.randn(250, 300) * torch.logspace(-2, 2, 250)[:, None]
    book = search_on_cpu.Book.of(codebook, None)
    z = book.centre(rows)
    lengths = z.norm(dim=1)
    true = (rows.double()[:, None] - codebook.double()).square().sum(2) / 2
    true = true - (rows.double() - book.shift.double()).square().sum(1, keepdim=True) / 2
    for kind in PRODUCTS:
        scores, slack = kind(book).scores(z, lengths)
        error = (scores[:, : len(codebook)] - true).abs().amax(1)
        bound = slack + book.rounding(lengths)
        assert (error <= bound).all()
        assert (error > 1e-3 * bound).all()  # and no more than it has to be


def test_low_precision_leaves_few_rows_to_a_second_search(monkeypatch):
    """Random features of the width of a ViT, the hardest there are: the short lists hold nearly all
    winners."""
    searched = []
    whole = search_on_cpu._search
    monkeypatch.setattr(
        search_on_cpu,
        "_search",
        lambda rows, *rest: searched.append(len(rows)) or whole(rows, *rest),
    )
    for kind in (search_on_cpu.InBFloat16, search_on_cpu.InInt8):
        monkeypatch.setattr(
            search_on_cpu,
            "choose_products",
            lambda num_rows, book, kind=kind: [kind, search_on_cpu.InFloat32],
        )
        searched.clear()
        rows, book = torch.randn(128, 768), torch.randn(8192, 768)
        assert torch.equal(
            search.nearest(rows, book), oracle(rows, book, search.half_norms(book.double()))[0]
        )
        assert sum(searched) < 1.1 * 128


@pytest.mark.parametrize("few", [0, 10**6])
def test_rows_that_a_product_leaves_open_are_decided_by_the_next_or_in_float64(
    monkeypatch, product, few
):
    monkeypatch.setattr(search_on_cpu, "MANY", 1)
    monkeypatch.setattr(search_on_cpu, "FEW", few)
    rows, book = 0.1 * torch.randn(301, 8), torch.randn(400, 8)
    assert torch.equal(search.nearest(rows, book), oracle(rows, book)[0])


def test_a_processor_without_fast_low_precision_searches_in_fp32(monkeypatch):
    book = search_on_cpu.Book.of(torch.randn(16384, 768), None)
    chosen = search_on_cpu.choose_products(8192, book)
    assert chosen[-1] is search_on_cpu.InFloat32 and search_on_cpu.choose_products(1, book) == [
        search_on_cpu.InFloat32
    ]
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert search_on_cpu.choose_products(8192, book) == [
        search_on_cpu.InBFloat16,
        search_on_cpu.InFloat32,
    ]


def test_torch_compile_keeps_it_in_one_graph():
    def step(rows, book):
        return F.embedding(search.nearest(rows * 2, book), book).sum()

    rows, book = torch.randn(64, 8), torch.randn(32, 8)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(rows, book), step(rows, book))


@pytest.mark.parametrize(("num_codes", "dim"), [(1088, 257), (1088, 130), (1100, 300)])
def test_equal_codes_go_to_the_lowest_index_in_float64(num_codes, dim):
    """Whatever piece of the codebook they lie in."""
    for num_rows in (1, 16, 33):
        book = torch.randn(num_codes, dim)
        book[-60:] = book[torch.randperm(num_codes - 60)[:60]]
        rows = book[-60:].repeat(2, 1)[:num_rows] + 0.01 * torch.randn(num_rows, dim)
        assert (search_on_cpu.in_float64(rows, book, None) < num_codes - 60).all()


@pytest.mark.parametrize(
    "book", [torch.ones(4096, 16), torch.randn(4096, 16) * 1e-9], ids=["equal", "near zero"]
)
def test_a_collapsed_codebook_takes_no_more_memory(monkeypatch, book):
    """Pairs that are scored again, of 512 rows and 4096 codes."""
    book = book.clone()
    book[0] = 1.0
    counts, scored = [], search_on_cpu.Book.exact_score
    monkeypatch.setattr(
        search_on_cpu.Book, "exact_score", lambda *a: counts.append(len(a[2])) or scored(*a)
    )
    rows = 1e-9 * torch.randn(512, 16)
    assert torch.equal(search.nearest(rows, book), oracle(rows, book)[0])
    assert sum(counts) <= 512 * search_on_cpu.CANDIDATES
