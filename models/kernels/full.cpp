// Softmax attention over all keys, or over those no later than the query: forward, and backward from mass and maximum.
//
// BLOCK queries are turned once into (dim, queries), so that the lanes of a vector are neighbouring queries: maximum,
// exponential and mass need no sum across lanes, and keys and values are read as they lie, number by number.
// Everything is then one product of matrices (see `product`) on squares of BLOCK queries by BLOCK keys:
//     scores: K·Qᵀ     out: Vᵀ·P     dP: V·dOᵀ     dQ: Kᵀ·dS     dV: P·dO     dK: dS·Q
// Of the square on the diagonal only what lies on or before it is computed, in steps of one vector of queries.
// The backward pass computes the weights again: O(n·dim) memory.  Rounding depends on the shape alone.
//
// A bias is a table of `offsets` numbers a head.  The score of query s and key t has the number target[s] - content[t]: of
// neighbouring queries in one row, neighbouring numbers.  So a vector of queries is cut into runs, and each run is one
// load of the table, or one sum into the table's gradient.
#include "jobs.h"
#include "product.h"

namespace {

struct Problem {
    int64_t batch, heads, seq, dim, causal, offsets;
    double scale;  // of the scores: 1/√dim
};

// numbers (heads, offsets); none without a bias.
template <typename T> struct Bias {
    const T* numbers;
    const int32_t *target, *content;  // (seq)
    explicit Bias(void** at)
        : numbers(static_cast<T*>(at[0])), target(static_cast<int32_t*>(at[1])), content(static_cast<int32_t*>(at[2])) {}
};

// Lanes from `lane` on have the table's numbers from `from` on, were it lane 0's.
struct Run {
    int lane;
    int32_t from;
};

constexpr int BLOCK = 64;  // queries, and keys, of a square
constexpr double LOG2E = 1.4426950408889634074;

template <typename T> struct Worker {
    using P = Product<T>;
    using S = typename P::S;
    using V = typename S::V;
    static constexpr int LANES = P::LANES, VECTORS = BLOCK / LANES;
    using Half = Product<T, (WIDEST > 16 ? WIDEST / 2 : WIDEST)>;

    const Problem& p;
    const bool half;    // dim fits into half a vector
    const int64_t e;    // dim in whole vectors
    const int64_t row;  // from one row to the next where slots lie as rows: e, or half a vector
    const T scale;      // of the scores, which are in powers of two
    int64_t vectors = VECTORS;  // of queries: fewer in a sequence's last block
    std::vector<T> memory;
    T *qt, *gt, *q, *g, *yt, *weights, *slopes, *peak, *mass, *delta, *table, *changes;
    Run runs[VECTORS][LANES];
    int count_of[VECTORS];  // runs of each vector

    Worker(const Problem& p, bool backward)
        : p(p), half(p.dim <= Half::LANES), e((p.dim + LANES - 1) / LANES * LANES), row(half ? Half::LANES : e),
          scale(T(LOG2E * p.scale)) {
        int64_t turned = e * BLOCK, square = BLOCK * BLOCK, padded = p.offsets + 2 * BLOCK;
        memory.resize((backward ? 5 : 2) * turned + (backward ? 2 : 1) * (square + padded) + 3 * BLOCK);
        T* at = memory.data();
        auto take = [&at](int64_t count) { T* got = at; at += count; return got; };
        qt = take(turned), yt = take(turned), weights = take(square);
        peak = take(BLOCK), mass = take(BLOCK), delta = take(BLOCK);
        table = take(padded) + BLOCK;
        if (backward) gt = take(turned), q = take(turned), g = take(turned), slopes = take(square), changes = take(padded) + BLOCK;
    }

    // `count` slots as rows, as columns of BLOCK, or both; what is missing is zero.
    void take(const T* from, int64_t stride, int64_t count, T* as_rows, T* as_columns, T factor) const {
        for (int64_t t = 0; t < BLOCK; t += LANES)
            for (int64_t d = 0; d < e; d += LANES) {
                V a[LANES];
                for (int i = 0; i < LANES; i++) {
                    a[i] = t + i < count ? S::load(from + (t + i) * stride + d, int(std::min<int64_t>(LANES, p.dim - d))) : V{};
                    if (as_rows) S::store(as_rows + (t + i) * row + d, a[i]);
                }
                S::transpose(a);
                for (int i = 0; i < LANES; i++) S::store(as_columns + (d + i) * BLOCK + t, a[i] * factor);
            }
    }

    // Columns of BLOCK, each query's times its factor, back to slots.
    void put(const T* columns, T* to, int64_t stride, int64_t count, const T* factor) const {
        for (int64_t t = 0; t < count; t += LANES) {
            V times = S::load(factor + t);
            for (int64_t d = 0; d < p.dim; d += LANES) {
                V a[LANES];
                for (int i = 0; i < LANES; i++) a[i] = S::load(columns + (d + i) * BLOCK + t) * times;
                S::transpose(a);
                for (int i = 0; i < LANES && t + i < count; i++)
                    S::store(to + (t + i) * stride + d, a[i], int(std::min<int64_t>(LANES, p.dim - d)));
            }
        }
    }

    static INLINE V lane_numbers() {
        V x{};
        for (int i = 0; i < LANES; i++) x[i] = T(i);
        return x;
    }

    // Calls part(vector, vectors, keys): whole, or on the diagonal each vector of queries with the keys it may see.
    template <typename Part> void parts(bool diagonal, int64_t keys, const Part& part) const {
        if (!diagonal) return part(0, vectors, keys);
        for (int64_t v = 0; v < vectors && v * LANES < keys; v++) part(v, 1, std::min<int64_t>(keys, (v + 1) * LANES));
    }

    // square[key][query] = Σ_d a[key][d] · turned[d][query]
    void scores(bool diagonal, int64_t keys, const T* a, int64_t stride, const T* turned, T* square) const {
        parts(diagonal, keys, [&](int64_t v, int64_t vectors, int64_t count) {
            P::template any<false>(count, vectors * LANES, p.dim, a, stride, 1, turned + v * LANES, BLOCK, square + v * LANES, BLOCK);
        });
    }

    // turned[d][query] += Σ_key a[key][d] · square[key][query]
    void gather(bool diagonal, int64_t keys, const T* a, int64_t stride, const T* square, T* turned) const {
        parts(diagonal, keys, [&](int64_t v, int64_t vectors, int64_t count) {
            P::template any<true>(p.dim, vectors * LANES, count, a, 1, stride, square + v * LANES, BLOCK, turned + v * LANES, BLOCK);
        });
    }

    // to[key][d] += Σ_query square[key][query] · as_rows[query][d]
    void scatter(bool diagonal, int64_t keys, const T* square, const T* as_rows, T* to, int64_t stride) const {
        int64_t queries = vectors * LANES;
        for (int64_t t = 0, count = diagonal ? LANES : keys; t < keys; t += count) {
            int64_t first = diagonal ? t : 0;
            auto add = half ? Half::template any<true> : P::template any<true>;
            add(std::min(count, keys - t), p.dim, queries - first, square + t * BLOCK + first, BLOCK, 1, as_rows + first * row,
                row, to + t * stride, stride);
        }
    }

    void take_bias(const Bias<T>& bias, int64_t h) {
        if (!bias.numbers) return;
        for (int64_t i = 0; i < p.offsets; i++) table[i] = bias.numbers[h * p.offsets + i] * T(LOG2E);
    }

    void take_runs(const Bias<T>& bias, int64_t first, int64_t count) {
        if (!bias.numbers) return;
        for (int n = 0; n < VECTORS; n++) {
            runs[n][0] = {0, bias.target[first + count - 1]}, count_of[n] = 1;  // where all lanes are beyond the sequence
            for (int i = 0; i < LANES && n * LANES + i < count; i++) {
                const int32_t* at = bias.target + first + n * LANES + i;
                if (i == 0) count_of[n] = 0;
                if (i == 0 || at[0] != at[-1] + 1) runs[n][count_of[n]++] = {i, at[0] - i};
            }
        }
    }

    // Adds to the scores of a square, whose first key is `key`, what the bias has for them.
    void add_bias(bool diagonal, int64_t key, int64_t keys, const Bias<T>& bias) const {
        parts(diagonal, keys, [&](int64_t first, int64_t vectors, int64_t count) {
            for (int64_t j = 0; j < count; j++)
                for (int64_t n = first; n < first + vectors; n++) {
                    const T* from = table - bias.content[key + j];
                    V more = S::load(from + runs[n][0].from);
                    for (int r = 1; r < count_of[n]; r++)
                        more = lane_numbers() >= T(runs[n][r].lane) ? S::load(from + runs[n][r].from) : more;
                    T* at = weights + j * BLOCK + n * LANES;
                    S::store(at, S::load(at) + more);
                }
        });
    }

    // The table's gradient, times 1/√dim, from the slopes of a square.
    void change(bool diagonal, int64_t key, int64_t keys, const Bias<T>& bias) {
        parts(diagonal, keys, [&](int64_t first, int64_t vectors, int64_t count) {
            for (int64_t j = 0; j < count; j++)
                for (int64_t n = first; n < first + vectors; n++) {
                    V slope = S::load(slopes + j * BLOCK + n * LANES);
                    T* to = changes - bias.content[key + j];
                    for (int r = 0; r < count_of[n]; r++) {
                        V own = lane_numbers() >= T(runs[n][r].lane) ? slope : V{};
                        if (r + 1 < count_of[n]) own = lane_numbers() < T(runs[n][r + 1].lane) ? own : V{};
                        S::store(to + runs[n][r].from, S::load(to + runs[n][r].from) + own);
                    }
                }
        });
    }

    // Scores of a vector of queries to weights: exp2(score - peak), 0 for keys beyond `seen`; those computed are masked.
    INLINE V weight(T* at, V top, int64_t key, int64_t vector, bool diagonal) const {
        V w = S::exp2(S::load(at) - top);
        if (diagonal && key >= vector * LANES) w = lane_numbers() >= T(key - vector * LANES) ? w : V{};
        S::store(at, w);
        return w;
    }

    // One square more for the running maximum, mass and sum.
    void attend(bool diagonal, int64_t key, int64_t keys, const View<T> (&in)[3], int64_t b, int64_t h, const Bias<T>& bias) const {
        scores(diagonal, keys, in[1].at(b, h) + key * in[1].slot, in[1].slot, qt, weights);
        if (bias.numbers) add_bias(diagonal, key, keys, bias);
        parts(diagonal, keys, [&](int64_t first, int64_t vectors, int64_t count) {
            for (int64_t n = first; n < first + vectors; n++) {
                T* at = weights + n * LANES;
                V before = S::load(peak + n * LANES), top = before;
                for (int64_t j = 0; j < count; j++) {
                    V x = S::load(at + j * BLOCK);
                    if (diagonal && j >= n * LANES) x = lane_numbers() >= T(j - n * LANES) ? x : top;
                    top = S::max(x, top);
                }
                V fade = S::exp2(before - top), total = S::load(mass + n * LANES) * fade;
                for (int64_t j = 0; j < count; j++) total += weight(at + j * BLOCK, top, j, n, diagonal);
                S::store(peak + n * LANES, top), S::store(mass + n * LANES, total);
                for (int64_t d = 0; d < p.dim; d++)
                    S::store(yt + d * BLOCK + n * LANES, S::load(yt + d * BLOCK + n * LANES) * fade);
            }
        });
        gather(diagonal, keys, in[2].at(b, h) + key * in[2].slot, in[2].slot, weights, yt);
    }

    // Calls square(first key, number of keys, whether on the diagonal) for all that the block of queries sees.
    template <typename Square> void squares(int64_t first, const Square& square) const {
        for (int64_t key = 0; key < (p.causal ? first : p.seq); key += BLOCK)
            square(key, std::min<int64_t>(BLOCK, p.seq - key), false);
        if (p.causal) square(first, std::min<int64_t>(BLOCK, p.seq - first), true);
    }

    void forward(int64_t b, int64_t h, int64_t first, const View<T> (&in)[3], const View<T>& out, T* stats, const Bias<T>& bias) {
        int64_t count = std::min<int64_t>(BLOCK, p.seq - first);
        vectors = (count + LANES - 1) / LANES;
        take(in[0].at(b, h) + first * in[0].slot, in[0].slot, count, nullptr, qt, scale);
        std::fill_n(yt, e * BLOCK, T(0)), std::fill_n(mass, BLOCK, T(0));
        std::fill_n(peak, BLOCK, std::numeric_limits<T>::lowest());
        take_bias(bias, h), take_runs(bias, first, count);
        squares(first, [&](int64_t key, int64_t keys, bool diagonal) { attend(diagonal, key, keys, in, b, h, bias); });
        T* at = stats + (b * p.heads + h) * 2 * p.seq + first;
        for (int64_t t = 0; t < count; t++) {
            mass[t] = T(1) / mass[t];
            at[t] = peak[t], at[p.seq + t] = mass[t];
        }
        put(yt, out.at(b, h) + first * out.slot, out.slot, count, mass);
    }

    // A block of queries: what it needs turned, and Σ_d of gradient times output.
    void take_block(int64_t b, int64_t h, int64_t first, const View<T> (&in)[5], const T* stats) {
        int64_t count = std::min<int64_t>(BLOCK, p.seq - first);
        vectors = (count + LANES - 1) / LANES;
        take(in[0].at(b, h) + first * in[0].slot, in[0].slot, count, q, qt, scale);
        take(in[3].at(b, h) + first * in[3].slot, in[3].slot, count, g, gt, T(1));
        const T *out = in[4].at(b, h) + first * in[4].slot, *at = stats + (b * p.heads + h) * 2 * p.seq + first;
        // Beyond the sequence no weight: whatever the bias, it is far below this peak.
        std::fill_n(peak, BLOCK, std::numeric_limits<T>::max() / 4), std::fill_n(mass, BLOCK, T(0)), std::fill_n(delta, BLOCK, T(0));
        for (int64_t t = 0; t < count; t++) {
            V total{};
            for (int64_t d = 0; d < p.dim; d += LANES)
                total += S::load(g + t * row + d, int(std::min<int64_t>(LANES, p.dim - d))) *
                         S::load(out + t * in[4].slot + d, int(std::min<int64_t>(LANES, p.dim - d)));
            peak[t] = at[t], mass[t] = at[p.seq + t], delta[t] = S::sum(total);
        }
    }

    // weights, and slopes = weights · (dP - delta) · 1/√dim
    void slope(bool diagonal, int64_t keys) const {
        parts(diagonal, keys, [&](int64_t first, int64_t vectors, int64_t count) {
            for (int64_t n = first; n < first + vectors; n++) {
                V top = S::load(peak + n * LANES), share = S::load(mass + n * LANES), less = S::load(delta + n * LANES);
                V factor = share * T(p.scale);
                for (int64_t j = 0; j < count; j++) {
                    T *at = weights + j * BLOCK + n * LANES, *to = slopes + j * BLOCK + n * LANES;
                    V w = weight(at, top, j, n, diagonal);
                    S::store(at, w * share);
                    S::store(to, w * factor * (S::load(to) - less));
                }
            }
        });
    }

    void backward(int64_t b, int64_t h, const View<T> (&in)[5], const View<T> (&grad)[3], const T* stats, const Bias<T>& bias,
                  T* bias_grad) {
        const T *k = in[1].at(b, h), *v = in[2].at(b, h);
        T *dk = grad[1].at(b, h), *dv = grad[2].at(b, h), one[BLOCK];
        std::fill_n(one, BLOCK, T(1));
        for (int64_t t = 0; t < p.seq; t++)
            std::fill_n(dk + t * grad[1].slot, p.dim, T(0)), std::fill_n(dv + t * grad[2].slot, p.dim, T(0));
        std::fill_n(changes - BLOCK, p.offsets + 2 * BLOCK, T(0));
        take_bias(bias, h);
        for (int64_t first = 0; first < p.seq; first += BLOCK) {
            take_block(b, h, first, in, stats);
            take_runs(bias, first, std::min<int64_t>(BLOCK, p.seq - first));
            std::fill_n(yt, e * BLOCK, T(0));
            squares(first, [&](int64_t key, int64_t keys, bool diagonal) {
                const T *k_at = k + key * in[1].slot, *v_at = v + key * in[2].slot;
                scores(diagonal, keys, k_at, in[1].slot, qt, weights);
                if (bias.numbers) add_bias(diagonal, key, keys, bias);
                scores(diagonal, keys, v_at, in[2].slot, gt, slopes);
                slope(diagonal, keys);
                if (bias_grad) change(diagonal, key, keys, bias);
                scatter(diagonal, keys, weights, g, dv + key * grad[2].slot, grad[2].slot);
                scatter(diagonal, keys, slopes, q, dk + key * grad[1].slot, grad[1].slot);
                gather(diagonal, keys, k_at, in[1].slot, slopes, yt);
            });
            put(yt, grad[0].at(b, h) + first * grad[0].slot, grad[0].slot, std::min<int64_t>(BLOCK, p.seq - first), one);
        }
        for (int64_t i = 0; bias_grad && i < p.offsets; i++) bias_grad[i] = changes[i] / T(p.scale);
    }
};

template <typename T> void forward(const Problem& p, int threads, void** at, const int64_t (*strides)[3]) {
    View<T> in[3] = {{at[0], strides[0]}, {at[1], strides[1]}, {at[2], strides[2]}}, out(at[3], strides[3]);
    int64_t images = p.batch * p.heads, blocks = (p.seq + BLOCK - 1) / BLOCK;
    auto block_of = [&](Worker<T>& worker, int64_t job) {
        int64_t image = job % images, block = blocks - 1 - job / images;  // the longest first
        worker.forward(image / p.heads, image % p.heads, block * BLOCK, in, out, static_cast<T*>(at[4]), Bias<T>(at + 5));
    };
    share<Worker<T>>(threads, images * blocks, block_of, p, false);
}

template <typename T> void backward(const Problem& p, int threads, void** at, const int64_t (*strides)[3]) {
    View<T> in[5] = {{at[0], strides[0]}, {at[1], strides[1]}, {at[2], strides[2]}, {at[3], strides[3]}, {at[4], strides[4]}};
    View<T> grad[3] = {{at[5], strides[5]}, {at[6], strides[6]}, {at[7], strides[7]}};
    auto image = [&](Worker<T>& worker, int64_t job) {
        T* bias_grad = at[12] ? static_cast<T*>(at[12]) + job * p.offsets : nullptr;
        worker.backward(job / p.heads, job % p.heads, in, grad, static_cast<const T*>(at[8]), Bias<T>(at + 9), bias_grad);
    };
    share<Worker<T>>(threads, p.batch * p.heads, image, p, true);
}

}  // namespace

// shape: batch, heads, seq, dim, causal, offsets; then the scale of scores.
// forward: q, k, v, out, stats (batch, heads, 2, seq); bias, target, content.
// backward: q, k, v, gradient of out, out, dq, dk, dv, stats; bias, target, content, its gradient (batch, heads, offsets),
//           which may be none.
#define EXPORT(name, T, type)                                                                   \
    extern "C" int full_##name##_##type(const int64_t* s, double scale, int threads, void** at, \
                                        const int64_t (*strides)[3]) {                          \
        Problem p{s[0], s[1], s[2], s[3], s[4], s[5], scale};                                   \
        return guarded([&] { name<T>(p, threads, at, strides); });                              \
    }
EXPORT(forward, float, float32)
EXPORT(forward, double, float64)
EXPORT(backward, float, float32)
EXPORT(backward, double, float64)
