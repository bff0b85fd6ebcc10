// Causal linear attention: φ(q)·S / φ(q)·z with S = Σ φ(k) vᵀ and z = Σ φ(k) over the keys no later than the query.
//
// One scan serves all: a matrix grows by an outer product a bᵀ at every slot, and y = xᵀ·matrix is read off.
//     out:   a = φ(k),  b = v,     x = φ(q)            with the slots in order
//     dφ(q): a = v,     b = φ(k),  x = g               in order
//     dφ(k): a = g,     b = φ(q),  x = v               backwards
//     dv:    a = φ(q),  b = g,     x = φ(k)            backwards
// where g is the gradient of the numerator, and in dφ v and g have one row more: ones, and the gradient of the mass.
// A tile of ROWS rows by one vector stays in registers for a block of slots, so that every multiplication is one that
// the definition asks for: 2·width·dim a slot and scan.  The forward pass keeps S and z before every block but the first,
// so that the backward pass reads each block once, the last block first.  Tiles fetch the next block while they compute.
#include "jobs.h"
#include "simd.h"

namespace {

struct Problem {
    int64_t batch, heads, seq, width, dim, feature, block;  // width of φ, dim of v; feature 0: φ(x) = x, 1: elu(x) + 1
    double floor;                                            // the normaliser is at least this
    int64_t last() const { return (seq - 1) / block * block; }  // where the last block begins
};

constexpr int ROWS = WIDEST >= 64 ? 16 : 8;     // of a tile: as many as registers allow
constexpr int LINE = 64;                        // bytes of a cache line

// Slots as rows, `pitch` numbers from one to the next; in working memory padded with zeros to whole vectors.
template <typename T> struct Rows {
    T* data;
    int64_t pitch;
    T* at(int64_t slot) const { return data + slot * pitch; }
    Rows from(int64_t column) const { return {data + column, pitch}; }
};

// Rows of a tensor in the next block: a slot's are fetched into the second level of cache.
struct Ahead {
    uintptr_t data;
    int64_t pitch, bytes;
    INLINE void fetch(int64_t slot) const {
        for (int64_t i = 0; i < bytes; i += LINE)
            __builtin_prefetch(reinterpret_cast<void*>(data + slot * pitch + i), 0, 2);
    }
};

template <typename T> struct Worker {
    static constexpr int LANES = WIDEST / sizeof(T);
    using S = Simd<T, LANES>;
    using V = typename S::V;

    const Problem& p;
    const int64_t m, e;  // width and dim in whole vectors
    std::vector<T> memory;
    Rows<T> q, k, v, g, y, ones, slope;
    T *share, *zeros, *state;
    std::vector<Ahead> ahead;  // one for a tile, while there are any

    static int64_t whole(int64_t x) { return (x + LANES - 1) / LANES * LANES; }

    explicit Worker(const Problem& p) : p(p), m(whole(p.width)), e(whole(p.dim)) {
        int64_t wide = std::max(m, e), block = whole(std::min(p.block, p.seq)), states = 2 * (p.dim + 1) * m + p.width * e;
        memory.resize(block * (2 * m + 2 * e + wide + 3) + states + 2 * LANES);
        ahead.reserve(8);
        T* at = aligned(memory.data());
        auto take = [&at](int64_t count) { T* got = at; at += count; return got; };
        q = {take(block * m), m}, k = {take(block * m), m}, v = {take(block * e), e}, g = {take(block * e), e};
        y = {take(block * wide), wide}, ones = {take(block), 1}, slope = {take(block), 1};
        share = take(block), zeros = take(LANES), state = take(states);
        std::fill_n(ones.data, block, T(1));
    }

    static INLINE V same(V x, int64_t) { return x; }

    static INLINE V feature_of(V x, int64_t) {
        typedef typename S::I I;  // of their bits: numbers below 0 are below it, and what is no number stays in either
        V above = (V)((I)x > I{} ? (I)x : I{}), below = (V)((I)x < I{} ? (I)x : I{});
        return above + S::exp2(below * T(1.4426950408889634074));
    }

    static Rows<T> rows(const View<T>& x, int64_t b, int64_t h, int64_t first) {
        return {x.at(b, h) + first * x.slot, x.slot};
    }

    // `count` slots into working memory, each vector x of slot t as change(x, t).
    template <typename Change>
    static INLINE void take(Rows<T> to, Rows<T> from, int64_t count, int64_t dim, const Change& change) {
        int64_t d = 0;
        for (; d + LANES <= dim; d += LANES)
            for (int64_t t = 0; t < count; t++) S::store(to.at(t) + d, change(S::load(from.at(t) + d), t));
        for (int64_t t = 0; t < count && d < dim; t++) {
            V x = change(S::load(from.at(t) + d, int(dim - d)), t);
            for (int64_t i = dim - d; i < LANES; i++) x[i] = 0;  // elu(0) + 1 is not 0
            S::store(to.at(t) + d, x);
        }
    }

    void take_features(Rows<T> to, Rows<T> from, int64_t count) const {
        if (p.feature) take(to, from, count, p.width, feature_of);
        else take(to, from, count, p.width, same);
    }

    // Whole vectors are read where they lie.
    void take_values(Rows<T> from, int64_t count) {
        if (p.dim == e) v = from;
        else take(v, from, count, p.dim, same);
    }

    void take_shares(const T* mass, int64_t count) const {
        for (int64_t t = 0; t < count; t++) share[t] = T(1) / (mass[t] < T(p.floor) ? T(p.floor) : mass[t]);
    }

    // The rows of y to slots, each vector x of slot t and channel d as change(x, t, d).
    template <typename Change> INLINE void put(Rows<T> to, int64_t count, int64_t dim, const Change& change) const {
        for (int64_t d = 0; d < dim; d += LANES)
            for (int64_t t = 0; t < count; t++)
                S::store(to.at(t) + d, change(S::load(y.at(t) + d), t, d), int(std::min<int64_t>(LANES, dim - d)));
    }

    // The rows of y are gradients of these features: to slots as gradients of what the features are of.  One row more of
    // the matrix is added on the way: a number a_t a slot, b and x as in `tile`.
    template <bool BACKWARDS>
    void put_inner(Rows<T> features, Rows<T> to, int64_t count, T* matrix, Rows<T> a, Rows<T> b, Rows<T> x) const {
        for (int64_t d = 0; d < p.width; d += LANES) {
            int lanes = int(std::min<int64_t>(LANES, p.width - d));
            V kept = S::load(matrix + d);
            for (int64_t i = 0; i < count; i++) {
                int64_t t = BACKWARDS ? count - 1 - i : i;
                kept += *a.at(t) * S::load(b.at(t) + d);
                V slope = S::load(y.at(t) + d) + *x.at(t) * kept, f = S::load(features.at(t) + d);
                S::store(to.at(t) + d, p.feature ? slope * (f > T(1) ? S::fill(1) : f) : slope, lanes);  // φ' is 1, or exp
            }
            S::store(matrix + d, kept);
        }
    }

    // A tile of N rows: matrix += a bᵀ, y = before + xᵀ matrix, slot by slot.
    template <int N, bool BACKWARDS>
    static void tile(T* matrix, int64_t pitch, int64_t count, Rows<T> a, Rows<T> b, Rows<T> x, Rows<T> before, Rows<T> y,
                     Ahead next) {
        constexpr int CHAINS = N < 4 ? N : 4;  // sums in parallel hide the latency of an addition
        V kept[N];
        for (int r = 0; r < N; r++) kept[r] = S::load(matrix + r * pitch);
        for (int64_t i = 0; i < count; i++) {
            int64_t t = BACKWARDS ? count - 1 - i : i;
            next.fetch(t);
            V add = S::load(b.at(t)), sums[CHAINS]{};
            for (int r = 0; r < N; r++) {
                kept[r] += a.at(t)[r] * add;
                sums[r % CHAINS] += x.at(t)[r] * kept[r];
            }
            for (int c = 1; c < CHAINS; c++) sums[0] += sums[c];
            S::store(y.at(t), S::load(before.at(t)) + sums[0]);
        }
        for (int r = 0; r < N; r++) S::store(matrix + r * pitch, kept[r]);
    }

    // The whole matrix (rows, lanes), tile by tile.
    template <bool BACKWARDS>
    void scan(T* matrix, int64_t rows, int64_t lanes, int64_t count, Rows<T> a, Rows<T> b, Rows<T> x) {
        for (int64_t lane = 0; lane < lanes; lane += LANES) {
            int64_t r = 0;
            auto by = [&](auto n) {
                constexpr int N = decltype(n)::value;
                for (; rows - r >= N; r += N) {
                    Ahead next{};
                    if (!ahead.empty()) next = ahead.back(), ahead.pop_back();
                    Rows<T> to = y.from(lane), before = r ? to : Rows<T>{zeros, 0};
                    tile<N, BACKWARDS>(matrix + r * lanes + lane, lanes, count, a.from(r), b.from(lane), x.from(r), before,
                                       to, next);
                }
            };
            by(std::integral_constant<int, ROWS>{});
            by(std::integral_constant<int, ROWS / 2>{});
            by(std::integral_constant<int, 2>{});
            by(std::integral_constant<int, 1>{});
        }
    }

    // Σ over the lanes of each of `count` slots, of which fill(t, n, x) sets n from t on.
    template <typename Fill> static INLINE void lane_sums(int64_t count, const Fill& fill, T* to) {
        for (int64_t t = 0; t < count; t += LANES) {
            V x[LANES]{};
            int n = int(std::min<int64_t>(LANES, count - t));
            fill(t, n, x);
            S::store(to + t, S::sums(x), n);
        }
    }

    // The block of each tensor that begins at `first`, for the tiles to fetch; the first two are as wide as φ.
    template <size_t N> void look_ahead(int64_t b, int64_t h, int64_t first, const View<T> (&tensors)[N]) {
        for (size_t i = 0; i < N; i++) {
            Rows<T> x = rows(tensors[i], b, h, first);
            int64_t size = sizeof(T);
            ahead.push_back({reinterpret_cast<uintptr_t>(x.data), x.pitch * size, (i < 2 ? p.width : p.dim) * size});
        }
    }

    // S and z as the backward pass wants them: for each channel of v, then for the mass, a row Σ φ(k) times it.
    void keep(const T* matrix, const T* sums, T* to) const {
        for (int64_t r = 0; r < p.width; r += LANES)
            for (int64_t d = 0; d < p.dim; d += LANES) {
                V x[LANES]{};
                for (int i = 0; i < LANES && r + i < p.width; i++) x[i] = S::load(matrix + (r + i) * e + d);
                S::transpose(x);
                for (int i = 0; i < LANES && d + i < p.dim; i++)
                    S::store(to + (d + i) * p.width + r, x[i], int(std::min<int64_t>(LANES, p.width - r)));
            }
        std::copy_n(sums, p.width, to + p.dim * p.width);
    }

    void forward(int64_t b, int64_t h, const View<T> (&given)[4], T* mass, const View<T>& kept) {
        T *matrix = state, *sums = state + p.width * e;
        mass += (b * p.heads + h) * p.seq;
        std::fill(matrix, sums + m, T(0));
        for (int64_t first = 0; first < p.seq; first += p.block) {
            int64_t count = std::min<int64_t>(p.block, p.seq - first);
            auto at = [&](int64_t which) { return rows(given[which], b, h, first); };
            if (first) keep(matrix, sums, kept.at(b, h) + (first / p.block - 1) * kept.slot);
            if (first < p.last()) look_ahead(b, h, first + p.block, given);
            take_features(q, at(0), count), take_features(k, at(1), count), take_values(at(2), count);
            lane_sums(count, [&](int64_t t, int n, V (&x)[LANES]) {
                for (int64_t d = 0; d < m; d += LANES) {
                    V sum = S::load(sums + d);
                    for (int i = 0; i < n; i++) {
                        sum += S::load(k.at(t + i) + d);
                        x[i] += sum * S::load(q.at(t + i) + d);
                    }
                    S::store(sums + d, sum);
                }
            }, mass + first);
            take_shares(mass + first, count);
            scan<false>(matrix, p.width, e, count, k, v, q);
            put(at(3), count, p.dim, [&](V x, int64_t t, int64_t) { return x * share[t]; });
            ahead.clear();
        }
    }

    // q, k, v of a block, and from the gradient of out those of the numerator (g) and of the mass (slope).
    void take_block(int64_t b, int64_t h, int64_t first, int64_t count, const View<T> (&in)[5], const T* mass) {
        auto at = [&](int64_t which) { return rows(in[which], b, h, first); };
        take_shares(mass, count);
        take_features(q, at(0), count), take_features(k, at(1), count), take_values(at(2), count);
        take(g, at(3), count, p.dim, [&](V x, int64_t t) { return x * share[t]; });
        lane_sums(count, [&](int64_t t, int n, V (&x)[LANES]) {
            for (int64_t d = 0; d < p.dim; d += LANES)
                for (int i = 0; i < n; i++)
                    x[i] -= S::load(g.at(t + i) + d) * S::load(at(4).at(t + i) + d, int(std::min<int64_t>(LANES, p.dim - d)));
        }, slope.data);
        for (int64_t t = 0; t < count; t++) slope.data[t] = mass[t] < T(p.floor) ? T(0) : slope.data[t];
    }

    void backward(int64_t b, int64_t h, const View<T> (&in)[5], const View<T> (&grad)[3], const T* mass, const View<T>& kept) {
        T *earlier = state, *later = earlier + (p.dim + 1) * m, *turned = later + (p.dim + 1) * m;
        mass += (b * p.heads + h) * p.seq;
        std::fill(state, turned + p.width * e, T(0));
        for (int64_t first = p.last(); first >= 0; first -= p.block) {
            int64_t count = std::min<int64_t>(p.block, p.seq - first);
            auto to = [&](int64_t which) { return rows(grad[which], b, h, first); };
            const T* before = first ? kept.at(b, h) + (first / p.block - 1) * kept.slot : nullptr;
            for (int64_t r = 0; r <= p.dim; r++)
                if (before) std::copy_n(before + r * p.width, p.width, earlier + r * m);
                else std::fill_n(earlier + r * m, p.width, T(0));
            if (first) look_ahead(b, h, first - p.block, in), look_ahead(b, h, first - p.block, grad);
            take_block(b, h, first, count, in, mass + first);
            scan<false>(earlier, p.dim, m, count, v, k, g);
            put_inner<false>(q, to(0), count, earlier + p.dim * m, ones, k, slope);
            scan<true>(later, p.dim, m, count, g, q, v);
            put_inner<true>(k, to(1), count, later + p.dim * m, slope, q, ones);
            scan<true>(turned, p.width, e, count, q, g, k);
            put(to(2), count, p.dim, [](V x, int64_t, int64_t) { return x; });
            ahead.clear();
        }
    }
};

template <typename T> void forward(const Problem& p, int threads, void** at, const int64_t (*strides)[3]) {
    View<T> given[4] = {{at[0], strides[0]}, {at[1], strides[1]}, {at[2], strides[2]}, {at[3], strides[3]}};
    View<T> kept(at[5], strides[5]);
    auto head = [&](Worker<T>& worker, int64_t job) {
        worker.forward(job / p.heads, job % p.heads, given, static_cast<T*>(at[4]), kept);
    };
    share<Worker<T>>(threads, p.batch * p.heads, head, p);
}

template <typename T> void backward(const Problem& p, int threads, void** at, const int64_t (*strides)[3]) {
    View<T> in[5] = {{at[0], strides[0]}, {at[1], strides[1]}, {at[2], strides[2]}, {at[3], strides[3]}, {at[4], strides[4]}};
    View<T> grad[3] = {{at[5], strides[5]}, {at[6], strides[6]}, {at[7], strides[7]}};
    View<T> kept(at[9], strides[9]);
    auto head = [&](Worker<T>& worker, int64_t job) {
        worker.backward(job / p.heads, job % p.heads, in, grad, static_cast<const T*>(at[8]), kept);
    };
    share<Worker<T>>(threads, p.batch * p.heads, head, p);
}

}  // namespace

// shape: batch, heads, seq, width, dim, feature, block; then the floor.
// forward: q, k, v, out, mass (batch, heads, seq), kept (batch, heads, blocks - 1, (dim + 1)·width).
// backward: q, k, v, gradient of out, out, dq, dk, dv, mass, kept.
#define EXPORT(name, T, type)                                                                     \
    extern "C" int linear_##name##_##type(const int64_t* s, double floor, int threads, void** at, \
                                          const int64_t (*strides)[3]) {                          \
        Problem p{s[0], s[1], s[2], s[3], s[4], s[5], s[6], floor};                               \
        return guarded([&] { name<T>(p, threads, at, strides); });                                \
    }
EXPORT(forward, float, float32)
EXPORT(forward, double, float64)
EXPORT(backward, float, float32)
EXPORT(backward, double, float64)
