// local2d.cpp's attention with an image of one head in each lane of a vector: no lane lies beyond a border, no window is
// shifted against a vector, and keys that no query sees are not computed.  It takes as many images as lanes, and a cache
// that holds R + 1 rows of all of them.
//
// A row of pixels lies as (columns, channels, LANES).  A few neighbouring queries, a tile, go together through the rows of
// keys, each from the leftmost key that one of them sees to the rightmost; where one does not see a key, its weight is 0
// (and what is no number spreads over the tile).
// The forward pass keeps a running maximum, mass and sum (Milakov & Gimelshein, 2018).
#pragma once
#include "local2d.h"

namespace {

template <typename T, int LANES> struct Images {
    using S = Simd<T, LANES>;
    using V = typename S::V;
    static constexpr int64_t STEP = LANES;  // images at a time
    static constexpr int TILE = 4, BLOCK = 4;  // queries of a tile; keys, or channels, that are summed at a time

    // Of a tensor, where each lane's image lies.
    struct Lanes {
        T* at[LANES];
        int64_t slot;
        int count;  // lanes in use
        Lanes(const Problem& p, const View<T>& x, int64_t first) : slot(x.slot) {
            count = int(std::min<int64_t>(LANES, p.images() - first));
            for (int i = 0; i < count; i++) at[i] = x.at((first + i) / p.heads, (first + i) % p.heads);
        }
    };

    // Keys in a row: columns [low, high) serve the tile; the offset of column j for a query at c is `offset` + (j - c)·step.
    struct Keys {
        T *k, *v, *dk, *dv;
        int64_t low, high, offset, step;
    };

    const Problem& p;
    const int64_t channels, pixel, plane;  // of a head, filled up to whole BLOCKs; numbers of a pixel, and of a row
    const int64_t ring, span;              // rows kept; numbers of a query's weights for a row
    const T scale;                         // of the scores, which are in powers of two
    std::vector<T> memory;
    T *k, *v, *dk, *dv, *q, *g, *y, *weights, *slopes, *bias, *changes;
    T* start;  // k, v, dk and dv of the start token, a pixel each
    V peak[TILE], mass[TILE], delta[TILE];

    static int64_t channels_of(const Problem& p) { return round_up(p.dim, BLOCK); }

    // Numbers that a thread keeps where it is to differentiate.
    static int64_t kept(const Problem& p) { return 4 * (p.radius + 1) * p.width * channels_of(p) * LANES; }

    Images(const Problem& p, bool backward)
        : p(p), channels(channels_of(p)), pixel(channels * LANES), plane(p.width * pixel), ring(p.radius + 1),
          span(std::min(p.width, 2 * p.radius + TILE) * LANES), scale(T(LOG2E * p.scale)) {
        int64_t gradients = backward ? 1 : 0, offsets = p.all() * LANES;
        memory.resize((2 + 2 * gradients) * ring * plane + 3 * plane + 4 * pixel + 2 * TILE * span + 2 * offsets + WIDEST / sizeof(T));
        T* at = aligned(memory.data());
        auto take = [&at](int64_t count) { T* got = at; at += count; return got; };
        k = take(ring * plane), v = take(ring * plane);
        dk = take(gradients * ring * plane), dv = take(gradients * ring * plane);
        q = take(plane), g = take(plane), y = take(plane), start = take(4 * pixel);
        weights = take(TILE * span), slopes = take(TILE * span), bias = take(offsets), changes = take(offsets);
    }

    T* ring_row(T* base, int64_t row) const { return base + row % ring * plane; }

    // `count` slots from `slot` on, as pixels; of the others of a row zeros.
    void turn(const Lanes& from, int64_t slot, int64_t count, int64_t all, T* to) const {
        for (int64_t col = 0; col < all; col++)
            for (int64_t d = 0; d < channels; d += LANES) {
                V a[LANES]{};
                int some = int(std::min<int64_t>(LANES, p.dim - d));
                for (int i = 0; i < from.count && col < count; i++)
                    a[i] = S::load(from.at[i] + (slot + col) * from.slot + d, some);
                S::transpose(a);
                for (int i = 0; i < LANES && d + i < channels; i++) S::store(to + col * pixel + (d + i) * LANES, a[i]);
            }
    }

    // Pixels times a factor, as `count` slots from `slot` on.
    void turn_back(const T* from, T factor, const Lanes& to, int64_t slot, int64_t count) const {
        for (int64_t col = 0; col < count; col++)
            for (int64_t d = 0; d < p.dim; d += LANES) {
                V a[LANES]{};
                int some = int(std::min<int64_t>(LANES, p.dim - d));
                for (int i = 0; i < some; i++) a[i] = S::load(from + col * pixel + (d + i) * LANES) * factor;
                S::transpose(a);
                for (int i = 0; i < to.count; i++) S::store(to.at[i] + (slot + col) * to.slot + d, a[i], some);
            }
    }

    void load_keys(int64_t row, const Lanes& of_k, const Lanes& of_v) const {
        int64_t slot = row * p.width + 1, count = std::min(p.width, p.pixels() - slot);  // no slot holds the last pixel
        turn(of_k, slot, count, p.width, ring_row(k, row)), turn(of_v, slot, count, p.width, ring_row(v, row));
    }

    void load_start(const Lanes& of_k, const Lanes& of_v) const {
        turn(of_k, 0, 1, 1, start), turn(of_v, 0, 1, 1, start + pixel);
    }

    // The numbers of each lane's head, in powers of two like the scores; without any all are 0.
    void load_bias(const T* given, int64_t first) const {
        std::fill_n(bias, p.all() * LANES, T(0)), std::fill_n(changes, p.all() * LANES, T(0));
        for (int64_t i = 0; given && i < p.all(); i++)
            for (int lane = 0; lane < LANES; lane++)
                bias[i * LANES + lane] = given[(first + lane) % p.heads * p.all() + i] * T(LOG2E);
    }

    // Calls use(keys) for the start token, unless not asked for, and for the rows from `farthest` to `nearest` above.
    template <typename Use>
    void each(int64_t row, int64_t col, int tile, int64_t farthest, int64_t nearest, bool started, const Use& use) const {
        if (started) use(Keys{start, start + pixel, start + 2 * pixel, start + 3 * pixel, 0, 1, 0, 0}, row);
        for (int64_t above = farthest; above >= nearest; above--) {
            int64_t from = row - above, low = std::max<int64_t>(0, col - p.radius);
            int64_t high = above ? std::min(p.width, col + tile + p.radius) : col + tile - 1;
            if (low >= high) continue;
            use(Keys{ring_row(k, from), ring_row(v, from), ring_row(dk, from), ring_row(dv, from), low, high,
                     p.first(above) + p.radius, 1}, from);
        }
    }

    // Calls seen(column) for the keys that a query at c sees, and unseen(column) for the others of its tile.
    template <typename Seen, typename Unseen>
    INLINE void sort(const Keys& keys, int64_t c, bool own, const Seen& seen, const Unseen& unseen) const {
        int64_t low = keys.low, high = keys.high;
        if (keys.step) low = std::max(low, c - p.radius), high = own ? std::min(high, c) : std::min(high, c + p.radius + 1);
        for (int64_t j = keys.low; j < std::min(low, keys.high); j++) unseen(j);
        for (int64_t j = low; j < high; j++) seen(j);
        for (int64_t j = std::max(low, high); j < keys.high; j++) unseen(j);
    }

    // to[query][key] = Σ_channel a[query]·b[key]
    template <int Q, int K> INLINE void product(const T* a, const T* b, T* to) const {
        V sums[Q][K]{};
        for (int64_t d = 0; d < pixel; d += LANES) {
            V x[Q];
            for (int i = 0; i < Q; i++) x[i] = S::load(a + i * pixel + d);
            for (int j = 0; j < K; j++) {
                V key = S::load(b + j * pixel + d);
                for (int i = 0; i < Q; i++) sums[i][j] += x[i] * key;
            }
        }
        for (int i = 0; i < Q; i++)
            for (int j = 0; j < K; j++) S::store(to + i * span + j * LANES, sums[i][j]);
    }

    template <int Q> void products(const T* a, const T* b, const Keys& keys, T* to) const {
        int64_t j = keys.low;
        for (; j + BLOCK <= keys.high; j += BLOCK, to += BLOCK * LANES) product<Q, BLOCK>(a, b + j * pixel, to);
        for (; j < keys.high; j++, to += LANES) product<Q, 1>(a, b + j * pixel, to);
    }

    // to[query] += Σ_key w[query][key]·b[key]
    template <int Q> void gather(const T* w, const T* b, const Keys& keys, T* to) const {
        for (int64_t d = 0; d < pixel; d += BLOCK * LANES) {
            V sums[Q][BLOCK];
            for (int i = 0; i < Q; i++)
                for (int c = 0; c < BLOCK; c++) sums[i][c] = S::load(to + i * pixel + d + c * LANES);
            for (int64_t j = keys.low; j < keys.high; j++) {
                const T *from = b + j * pixel + d, *at = w + (j - keys.low) * LANES;
                V x[Q];
                for (int i = 0; i < Q; i++) x[i] = S::load(at + i * span);
                for (int c = 0; c < BLOCK; c++) {
                    V value = S::load(from + c * LANES);
                    for (int i = 0; i < Q; i++) sums[i][c] += x[i] * value;
                }
            }
            for (int i = 0; i < Q; i++)
                for (int c = 0; c < BLOCK; c++) S::store(to + i * pixel + d + c * LANES, sums[i][c]);
        }
    }

    // to[key] += Σ_query w[query][key]·a[query]
    template <int Q> void scatter(const T* w, const T* a, const Keys& keys, T* to) const {
        for (int64_t d = 0; d < pixel; d += BLOCK * LANES) {
            V given[Q][BLOCK];
            for (int i = 0; i < Q; i++)
                for (int c = 0; c < BLOCK; c++) given[i][c] = S::load(a + i * pixel + d + c * LANES);
            for (int64_t j = keys.low; j < keys.high; j++) {
                const T* at = w + (j - keys.low) * LANES;
                T* sum = to + j * pixel + d;
                V x[Q];
                for (int i = 0; i < Q; i++) x[i] = S::load(at + i * span);
                for (int c = 0; c < BLOCK; c++) {
                    V here = S::load(sum + c * LANES);
                    for (int i = 0; i < Q; i++) here += x[i] * given[i][c];
                    S::store(sum + c * LANES, here);
                }
            }
        }
    }

    // Calls tile(number of queries, column) over a row.
    template <typename Tile> void tiles(const Tile& tile) const {
        int64_t col = 0;
        for (; col + TILE <= p.width; col += TILE) tile(std::integral_constant<int, TILE>{}, col);
        for (; col < p.width; col++) tile(std::integral_constant<int, 1>{}, col);
    }

    void forward(int64_t first, int64_t from, int64_t to, const View<T> (&in)[3], const View<T>& out, const T* given, T* stats) {
        Lanes of_q(p, in[0], first), of_k(p, in[1], first), of_v(p, in[2], first), of_out(p, out, first);
        load_start(of_k, of_v), load_bias(given, first);
        for (int64_t row = std::max<int64_t>(0, from - p.radius); row < from; row++) load_keys(row, of_k, of_v);
        for (int64_t row = from; row < to; row++) {
            load_keys(row, of_k, of_v), turn(of_q, row * p.width, p.width, p.width, q);
            std::fill_n(y, plane, T(0));
            tiles([&](auto tile, int64_t col) {
                attend<tile.value>(row, col);
                for (int i = 0; i < tile.value; i++)
                    for (int lane = 0; lane < of_q.count; lane++) {
                        T* at = stats + (first + lane) * 2 * p.pixels() + row * p.width + col + i;
                        at[0] = peak[i][lane], at[p.pixels()] = mass[i][lane];
                    }
            });
            turn_back(y, T(1), of_out, row * p.width, p.width);
        }
    }

    // A tile of queries; leaves the share of a weight in `mass`.
    template <int Q> void attend(int64_t row, int64_t col) {
        T* to = y + col * pixel;
        for (int i = 0; i < Q; i++) peak[i] = S::fill(std::numeric_limits<T>::lowest()), mass[i] = V{};
        each(row, col, Q, std::min(row, p.radius), 0, true, [&](const Keys& keys, int64_t from) {
            products<Q>(q + col * pixel, keys.k, keys, weights);
            for (int i = 0; i < Q; i++) weigh(keys, col + i, from == row, weights + i * span - keys.low * LANES, i, to + i * pixel);
            gather<Q>(weights, keys.v, keys, to);
        });
        for (int i = 0; i < Q; i++) {
            mass[i] = T(1) / mass[i];
            for (int64_t d = 0; d < pixel; d += LANES) S::store(to + i * pixel + d, S::load(to + i * pixel + d) * mass[i]);
        }
    }

    // Scores of query i to weights; what was summed before fades to the new maximum.
    INLINE void weigh(const Keys& keys, int64_t c, bool own, T* w, int i, T* sum) {
        const T* added = bias + (keys.offset - c * keys.step) * LANES;
        V top = peak[i], total{};
        auto none = [&](int64_t j) { S::store(w + j * LANES, V{}); };
        sort(keys, c, own, [&](int64_t j) {
            V x = S::load(w + j * LANES) * scale + S::load(added + j * keys.step * LANES);
            S::store(w + j * LANES, x), top = S::max(top, x);
        }, none);
        sort(keys, c, own, [&](int64_t j) {
            V x = S::exp2(S::load(w + j * LANES) - top);
            S::store(w + j * LANES, x), total += x;
        }, [](int64_t) {});
        V fade = S::exp2(peak[i] - top);
        peak[i] = top, mass[i] = mass[i] * fade + total;
        for (int64_t d = 0; d < pixel; d += LANES) S::store(sum + d, S::load(sum + d) * fade);
    }

    // Gradients of query rows and key rows [from, to).
    void backward(int64_t first, int64_t from, int64_t to, const View<T> (&in)[5], const View<T> (&grad)[3], const T* given,
                  const T* stats, const Sums<T>& sums) {
        Lanes of_q(p, in[0], first), of_k(p, in[1], first), of_v(p, in[2], first), of_g(p, in[3], first), of_out(p, in[4], first);
        Lanes to_q(p, grad[0], first), to_k(p, grad[1], first), to_v(p, grad[2], first);
        load_start(of_k, of_v), load_bias(given, first), std::fill_n(start + 2 * pixel, 2 * pixel, T(0));
        for (int64_t row = std::max<int64_t>(0, from - p.radius); row < from; row++) load_keys(row, of_k, of_v);
        auto put = [&](int64_t row) {
            int64_t slot = row * p.width + 1, count = std::min(p.width, p.pixels() - slot);
            turn_back(ring_row(dk, row), T(p.scale), to_k, slot, count), turn_back(ring_row(dv, row), T(1), to_v, slot, count);
        };
        int64_t last = std::min(p.height, to + p.radius);
        for (int64_t row = from; row < last; row++) {
            if (row < to) load_keys(row, of_k, of_v), std::fill_n(ring_row(dk, row), plane, T(0)), std::fill_n(ring_row(dv, row), plane, T(0));
            turn(of_q, row * p.width, p.width, p.width, q), turn(of_g, row * p.width, p.width, p.width, g);
            turn(of_out, row * p.width, p.width, p.width, y);
            tiles([&](auto tile, int64_t col) {
                take_stats<tile.value>(first, row, col, of_q.count, stats);
                differentiate<tile.value>(row, col, from, to, given);
            });
            if (row < to) turn_back(y, T(p.scale), to_q, row * p.width, p.width);
            if (row - p.radius >= from) put(row - p.radius);
        }
        for (int64_t row = std::max(from, last - p.radius); row < to; row++) put(row);
        for (int lane = 0; lane < of_q.count; lane++) {
            T *start_grad = sums.start(first + lane), *bias_grad = sums.bias(first + lane);
            for (int64_t d = 0; d < p.dim; d++) {
                start_grad[d] = start[2 * pixel + d * LANES + lane] * T(p.scale);
                start_grad[p.dim + d] = start[3 * pixel + d * LANES + lane];
            }
            for (int64_t i = 0; bias_grad && i < p.all(); i++) bias_grad[i] = changes[i * LANES + lane];
        }
    }

    // A tile's maximum, share of a weight and Σ_channel of gradient times output, which lies in y; there 0 is left.
    template <int Q> void take_stats(int64_t first, int64_t row, int64_t col, int count, const T* stats) {
        for (int i = 0; i < Q; i++) {
            peak[i] = mass[i] = delta[i] = V{};
            for (int lane = 0; lane < count; lane++) {
                const T* at = stats + (first + lane) * 2 * p.pixels() + row * p.width + col + i;
                peak[i][lane] = at[0], mass[i][lane] = at[p.pixels()];
            }
            for (int64_t d = (col + i) * pixel; d < (col + i + 1) * pixel; d += LANES)
                delta[i] += S::load(g + d) * S::load(y + d), S::store(y + d, V{});
        }
    }

    template <int Q> void differentiate(int64_t row, int64_t col, int64_t from, int64_t to, bool biased) {
        int64_t nearest = std::max<int64_t>(0, row - to + 1);  // keys beyond the band are another's
        bool own = row < to;
        const T *queries = q + col * pixel, *upstream = g + col * pixel;
        each(row, col, Q, std::min(row, p.radius), nearest, own, [&](const Keys& keys, int64_t key_row) {
            products<Q>(queries, keys.k, keys, weights), products<Q>(upstream, keys.v, keys, slopes);
            for (int i = 0; i < Q; i++) slope(keys, col + i, key_row == row, i, biased && own);
            if (own) gather<Q>(slopes, keys.k, keys, y + col * pixel);
            if (key_row < from) return;
            scatter<Q>(slopes, queries, keys, keys.dk), scatter<Q>(weights, upstream, keys, keys.dv);
        });
    }

    INLINE void slope(const Keys& keys, int64_t c, bool own, int i, bool biased) const {
        T *w = weights + i * span - keys.low * LANES, *s = slopes + i * span - keys.low * LANES;
        const int64_t offset = (keys.offset - c * keys.step) * LANES;
        sort(keys, c, own, [&](int64_t j) {
            int64_t at = j * LANES, by = offset + at * keys.step;
            V x = S::exp2(S::load(w + at) * scale + S::load(bias + by) - peak[i]) * mass[i];
            V change = x * (S::load(s + at) - delta[i]);
            S::store(w + at, x), S::store(s + at, change);
            if (biased) S::store(changes + by, S::load(changes + by) + change);
        }, [&](int64_t j) { S::store(w + j * LANES, V{}), S::store(s + j * LANES, V{}); });
    }
};

}  // namespace
