// softmax attention over the raster-earlier pixels at most `radius` rows and columns away, and the start token.
//
// Slot 0 of the keys holds the start token and slot p + 1 holds pixel p; query slot p predicts pixel p.
// Offsets are numbered 0: the start token; then key rows from `radius` above to the query's own, left to right.
// Each may have a bias, a number for each head that is added to its scores.
// The backward pass computes the weights again from each query's maximum and mass: O(n·dim) memory.
//
// No score, exponential or use of it needs a sum across lanes, in either of two ways.  Where images are many, they are the
// lanes (local2d_images.h).  Where they are few, neighbouring columns are: a row of keys is turned once into (dim,
// columns), and beyond its borders stand `radius` columns of zeros.  Each thread then keeps the weights and slopes of
// R + 1 rows of queries, 2·(R + 1)·(2R² + 2R + 1)·(width + 2R) numbers, R the radius.
#include <type_traits>

#include "local2d_images.h"

namespace {

constexpr int64_t CACHE = 1 << 22;  // bytes, of a core's own and its share of the last

template <typename T, int LANES> struct Columns {
    using S = Simd<T, LANES>;
    using V = typename S::V;
    static constexpr int64_t STEP = 1;  // images at a time
    static constexpr int BLOCK = 8;  // channels, or offsets, that are summed at a time in registers

    const Problem& p;
    const int64_t pitch, channels, ring;  // of a turned row; channels padded to BLOCK; rows kept
    const int64_t plane, field;           // numbers in a turned row, and in the weights of a row
    const T scale;                        // of the scores, which are in powers of two
    std::vector<T> memory;
    T *kt, *vt, *qt, *gt, *weights, *slopes, *border, *block, *start, *bias, *bias_sums;

    Columns(const Problem& p, bool backward)
        : p(p), pitch(round_up(p.width, LANES) + 2 * p.radius), channels(round_up(p.dim, BLOCK)), ring(p.radius + 1),
          plane(channels * pitch), field(p.all() * pitch), scale(T(LOG2E * p.scale)) {
        int64_t queries = backward ? ring : 1;
        memory.resize((2 * ring + 2 * queries) * plane + 2 * queries * field + pitch + (channels + 1) * LANES +
                      2 * channels * (1 + LANES) + p.all() * (1 + LANES));
        T* at = memory.data();
        auto take = [&at](int64_t count) { T* got = at; at += count; return got; };
        kt = take(ring * plane), vt = take(ring * plane), qt = take(queries * plane), gt = take(queries * plane);
        weights = take(queries * field), slopes = take(queries * field);
        border = take(pitch), block = take((channels + 1) * LANES), start = take(2 * channels * (1 + LANES));
        bias = take(p.all()), bias_sums = take(p.all() * LANES);
        std::fill(border, border + pitch, -std::numeric_limits<T>::infinity());
        std::fill(border + p.radius, border + p.radius + p.width, T(0));
    }

    // The numbers of a head, in powers of two like the scores; without any all are 0.
    void set_bias(const T* given, int64_t head) const {
        for (int64_t i = 0; given && i < p.all(); i++) bias[i] = given[head * p.all() + i] * T(LOG2E);
    }

    T* ring_row(T* base, int64_t row, int64_t size) const { return base + row % ring * size; }

    // `count` slots from `from` on, as columns of `to`; missing columns of the last block become zeros.
    void turn(const T* from, int64_t stride, int64_t count, T* to) const {
        for (int64_t col = 0; col < p.width; col += LANES)
            for (int64_t d = 0; d < p.dim; d += LANES) {
                V a[LANES];
                for (int i = 0; i < LANES; i++)
                    a[i] = col + i < count ? S::load(from + (col + i) * stride + d, int(std::min<int64_t>(LANES, p.dim - d))) : V{};
                S::transpose(a);
                for (int i = 0; i < LANES && d + i < p.dim; i++) S::store(to + (d + i) * pitch + p.radius + col, a[i]);
            }
    }

    // The turned block (channels, LANES) as `count` slots.
    void turn_back(const T* from, T* to, int64_t stride, int64_t count) const {
        for (int64_t d = 0; d < p.dim; d += LANES) {
            V a[LANES];
            for (int i = 0; i < LANES; i++) a[i] = d + i < channels ? S::load(from + (d + i) * LANES) : V{};
            S::transpose(a);
            for (int i = 0; i < LANES && i < count; i++)
                S::store(to + i * stride + d, a[i], int(std::min<int64_t>(LANES, p.dim - d)));
        }
    }

    void load_keys(int64_t row, const T* k, int64_t k_stride, const T* v, int64_t v_stride) const {
        int64_t count = std::min(p.width, p.pixels() - 1 - row * p.width);  // no slot holds the last pixel
        turn(k + (row * p.width + 1) * k_stride, k_stride, count, ring_row(kt, row, plane));
        turn(v + (row * p.width + 1) * v_stride, v_stride, count, ring_row(vt, row, plane));
    }

    // to[i] = Σ_d a[d]·b[d] shifted by i columns, for N shifts.
    template <int N> INLINE void products(const T* a, const T* b, T* to) const {
        V sums[N]{};
        for (int64_t d = 0; d < channels; d++) {
            V x = S::load(a + d * pitch);
            for (int i = 0; i < N; i++) sums[i] += x * S::load(b + d * pitch + i);
        }
        for (int i = 0; i < N; i++) S::store(to + i * pitch, sums[i]);
    }

    void products(int64_t shifts, const T* a, const T* b, T* to) const {
        for (; shifts >= 8; shifts -= 8, b += 8, to += 8 * pitch) products<8>(a, b, to);
        switch (shifts) {
            case 7: return products<7>(a, b, to);
            case 6: return products<6>(a, b, to);
            case 5: return products<5>(a, b, to);
            case 4: return products<4>(a, b, to);
            case 3: return products<3>(a, b, to);
            case 2: return products<2>(a, b, to);
            case 1: return products<1>(a, b, to);
        }
    }

    // Σ_d of a turned block with one vector.
    INLINE V product(const T* a, const T* vector) const {
        V sum{};
        for (int64_t d = 0; d < channels; d++) sum += S::load(a + d * pitch) * vector[d];
        return sum;
    }

    // to[d] += Σ_i w[i]·b[d] shifted by i·step columns from `b` on; weights move by `pitch + w_step`.
    INLINE void gather(int64_t shifts, const T* w, int64_t w_step, const T* b, int64_t b_step, T* to) const {
        for (int64_t d = 0; d < channels; d += BLOCK) {
            V sums[BLOCK];
            for (int j = 0; j < BLOCK; j++) sums[j] = S::load(to + (d + j) * LANES);
            for (int64_t i = 0; i < shifts; i++) {
                V x = S::load(w + i * (pitch + w_step));
                const T* from = b + d * pitch + i * b_step;
                for (int j = 0; j < BLOCK; j++) sums[j] += x * S::load(from + j * pitch);
            }
            for (int j = 0; j < BLOCK; j++) S::store(to + (d + j) * LANES, sums[j]);
        }
    }

    // Scores of the block of columns from `col` on, into w + offset·pitch; key rows from `nearest` to `farthest` above.
    void scores(int64_t row, int64_t col, int64_t nearest, int64_t farthest, const T* q, const T* k0, T* w) const {
        S::store(w, product(q, k0) * scale + bias[0]);
        for (int64_t above = nearest; above <= farthest; above++) {
            T *to = w + p.first(above) * pitch, *added = bias + p.first(above);
            products(p.offsets(above), q, ring_row(kt, row - above, plane) + col, to);
            for (int64_t i = 0; i < p.offsets(above); i++)
                S::store(to + i * pitch, S::load(to + i * pitch) * scale + (S::load(border + col + i) + added[i]));
        }
    }

    void forward(int64_t image, int64_t from, int64_t to, const View<T> (&in)[3], const View<T>& out, const T* given, T* stats) {
        const View<T>&q = in[0], &k = in[1], &v = in[2];
        int64_t b = image / p.heads, h = image % p.heads;
        set_bias(given, h);
        T *k0 = start, *v0 = start + channels;
        std::copy_n(k.at(b, h), p.dim, k0), std::copy_n(v.at(b, h), p.dim, v0);
        for (int64_t row = std::max<int64_t>(0, from - p.radius); row < from; row++)
            load_keys(row, k.at(b, h), k.slot, v.at(b, h), v.slot);
        for (int64_t row = from; row < to; row++) {
            load_keys(row, k.at(b, h), k.slot, v.at(b, h), v.slot);
            turn(q.at(b, h) + row * p.width * q.slot, q.slot, p.width, qt);
            for (int64_t col = 0; col < p.width; col += LANES) {
                int64_t slot = row * p.width + col;
                forward_block(row, col, k0, v0, out.at(b, h) + slot * out.slot, out.slot,
                              stats + image * 2 * p.pixels() + slot);
            }
        }
    }

    void forward_block(int64_t row, int64_t col, const T* k0, const T* v0, T* out, int64_t stride, T* stats) {
        int64_t farthest = std::min(row, p.radius), first = p.first(farthest), count = p.all();
        T* w = weights;
        scores(row, col, 0, farthest, qt + p.radius + col, k0, w);
        V most = S::load(w), mass{};
        for (int64_t i = first; i < count; i++) most = S::max(most, S::load(w + i * pitch));
        auto weigh = [&](int64_t i) {
            V x = S::exp2(S::load(w + i * pitch) - most);
            S::store(w + i * pitch, x), mass += x;
        };
        weigh(0);
        for (int64_t i = first; i < count; i++) weigh(i);
        V share = T(1) / mass;
        for (int64_t d = 0; d < channels; d++) S::store(block + d * LANES, S::load(w) * v0[d]);
        for (int64_t above = farthest; above >= 0; above--)
            gather(p.offsets(above), w + p.first(above) * pitch, 0, ring_row(vt, row - above, plane) + col, 1, block);
        for (int64_t d = 0; d < channels; d++) S::store(block + d * LANES, S::load(block + d * LANES) * share);
        int columns = int(std::min<int64_t>(LANES, p.width - col));
        turn_back(block, out, stride, columns);
        S::store(stats, most, columns), S::store(stats + p.pixels(), share, columns);
    }

    // Gradients of query rows and key rows [from, to).
    void backward(int64_t image, int64_t from, int64_t to, const View<T> (&in)[5], const View<T> (&grad)[3], const T* given,
                  const T* stats, const Sums<T>& to_sums) {
        int64_t b = image / p.heads, h = image % p.heads;
        T *start_grad = to_sums.start(image), *bias_grad = to_sums.bias(image);
        set_bias(given, h);
        const View<T>&q = in[0], &k = in[1], &v = in[2], &g = in[3], &out = in[4];
        T *k0 = start, *v0 = start + channels, *sums = start + 2 * channels;
        std::copy_n(k.at(b, h), p.dim, k0), std::copy_n(v.at(b, h), p.dim, v0);
        std::fill(sums, sums + 2 * channels * LANES, T(0)), std::fill(bias_sums, bias_sums + p.all() * LANES, T(0));
        stats += image * 2 * p.pixels();
        for (int64_t row = std::max<int64_t>(0, from - p.radius); row < from; row++)
            load_keys(row, k.at(b, h), k.slot, v.at(b, h), v.slot);
        int64_t last = std::min(p.height, to + p.radius);
        for (int64_t row = from; row < last; row++) {
            if (row < to) load_keys(row, k.at(b, h), k.slot, v.at(b, h), v.slot);
            turn(q.at(b, h) + row * p.width * q.slot, q.slot, p.width, ring_row(qt, row, plane));
            turn(g.at(b, h) + row * p.width * g.slot, g.slot, p.width, ring_row(gt, row, plane));
            for (int64_t col = 0; col < p.width; col += LANES)
                backward_queries(row, col, to, k0, v0, out.at(b, h), out.slot, g.at(b, h), g.slot, stats,
                                 grad[0].at(b, h), grad[0].slot, sums, bias_grad);
            if (row - p.radius >= from) backward_keys(row - p.radius, row, grad, b, h);
        }
        for (int64_t row = std::max(from, last - p.radius); row < to; row++) backward_keys(row, last - 1, grad, b, h);
        for (int64_t d = 0; d < p.dim; d++) {
            start_grad[d] = S::sum(S::load(sums + d * LANES)) * T(p.scale);
            start_grad[p.dim + d] = S::sum(S::load(sums + (channels + d) * LANES));
        }
        for (int64_t i = 0; bias_grad && i < p.all(); i++) bias_grad[i] = S::sum(S::load(bias_sums + i * LANES));
    }

    // Weights and slopes of a block of queries, kept for the keys; its own gradient and its share of the start token's.
    void backward_queries(int64_t row, int64_t col, int64_t to, const T* k0, const T* v0, const T* out, int64_t out_stride,
                          const T* g, int64_t g_stride, const T* stats, T* dq, int64_t dq_stride, T* sums,
                          bool biased) {
        const T *qb = ring_row(qt, row, plane) + p.radius + col, *gb = ring_row(gt, row, plane) + p.radius + col;
        T* w = ring_row(weights, row, field) + p.radius + col;
        T* s = ring_row(slopes, row, field) + p.radius + col;
        int64_t slot = row * p.width + col, farthest = std::min(row, p.radius);
        int64_t nearest = std::max<int64_t>(0, row - to + 1);  // keys beyond the band are another's
        int columns = int(std::min<int64_t>(LANES, p.width - col));
        V most = S::load(stats + slot, columns), share = S::load(stats + p.pixels() + slot, columns);
        V delta = row_products(out + slot * out_stride, out_stride, g + slot * g_stride, g_stride, columns);
        scores(row, col, nearest, farthest, qb, k0, w);
        S::store(s, product(gb, v0));
        auto differentiate = [&](int64_t i) {
            V x = S::exp2(S::load(w + i * pitch) - most) * share;
            S::store(w + i * pitch, x), S::store(s + i * pitch, x * (S::load(s + i * pitch) - delta));
        };
        differentiate(0);
        for (int64_t above = nearest; above <= farthest; above++) {
            int64_t first = p.first(above);
            products(p.offsets(above), gb, ring_row(vt, row - above, plane) + col, s + first * pitch);
            for (int64_t i = first; i < first + p.offsets(above); i++) differentiate(i);
        }
        if (row >= to) return;
        auto add = [&](int64_t i) { S::store(bias_sums + i * LANES, S::load(bias_sums + i * LANES) + S::load(s + i * pitch)); };
        if (biased) {
            add(0);
            for (int64_t i = p.first(farthest); i < p.all(); i++) add(i);
        }
        V weight = S::load(w), slope = S::load(s);
        for (int64_t d = 0; d < channels; d++) {
            S::store(block + d * LANES, slope * k0[d]);
            T *dk = sums + d * LANES, *dv = sums + (channels + d) * LANES;
            S::store(dk, S::load(dk) + slope * S::load(qb + d * pitch));
            S::store(dv, S::load(dv) + weight * S::load(gb + d * pitch));
        }
        for (int64_t above = farthest; above >= 0; above--)
            gather(p.offsets(above), s + p.first(above) * pitch, 0, ring_row(kt, row - above, plane) + col, 1, block);
        put(block, T(p.scale), dq + slot * dq_stride, dq_stride, columns);
    }

    // Σ_d a·b of `count` slots, a lane each.
    V row_products(const T* a, int64_t a_stride, const T* b, int64_t b_stride, int count) const {
        V sum{};
        for (int64_t d = 0; d < p.dim; d += LANES) {
            V x[LANES];
            int rest = int(std::min<int64_t>(LANES, p.dim - d));
            for (int i = 0; i < LANES; i++)
                x[i] = i < count ? S::load(a + i * a_stride + d, rest) * S::load(b + i * b_stride + d, rest) : V{};
            S::transpose(x);
            for (int i = 0; i < LANES; i++) sum += x[i];
        }
        return sum;
    }

    // Gradients of a row of keys, from the queries in rows up to `last` that saw them.
    void backward_keys(int64_t row, int64_t last, const View<T> (&grad)[3], int64_t b, int64_t h) {
        T* kinds[2][2] = {{slopes, qt}, {weights, gt}};
        for (int64_t col = 0; col < p.width; col += LANES) {
            int64_t slot = row * p.width + col + 1;
            int64_t columns = std::min({int64_t(LANES), p.width - col, p.pixels() - slot});
            if (columns < 1) continue;
            for (int kind = 0; kind < 2; kind++) {
                const View<T>& to = grad[1 + kind];
                std::fill(block, block + channels * LANES, T(0));
                for (int64_t query = row; query <= last; query++) {
                    // The key's offset i columns from the window's left is seen by the query radius - i to its right.
                    int64_t above = query - row, shifts = p.offsets(above);
                    const T* w = ring_row(kinds[kind][0], query, field) + p.first(above) * pitch + 2 * p.radius + col;
                    const T* x = ring_row(kinds[kind][1], query, plane) + 2 * p.radius + col;
                    gather(shifts, w, -1, x, -1, block);
                }
                put(block, kind ? T(1) : T(p.scale), to.at(b, h) + slot * to.slot, to.slot, columns);
            }
        }
    }

    void put(T* turned, T factor, T* to, int64_t stride, int64_t count) const {
        for (int64_t d = 0; d < channels; d++) S::store(turned + d * LANES, S::load(turned + d * LANES) * factor);
        turn_back(turned, to, stride, count);
    }
};

// Calls work(worker, image, its bands, band) for every STEP images and each of their bands of rows.
template <typename Way, typename Work> void run(const Problem& p, bool backward, int threads, const Work& work) {
    int64_t bands = p.bands(groups<Way>(p));
    auto band = [&](Way& way, int64_t job) { work(way, job / bands * Way::STEP, bands, job % bands); };
    share<Way>(threads, groups<Way>(p) * bands, band, p, backward);
}

template <typename Way, typename T> void forward(const Problem& p, int threads, void** at, const int64_t (*strides)[3]) {
    View<T> in[3] = {{at[0], strides[0]}, {at[1], strides[1]}, {at[2], strides[2]}}, out(at[3], strides[3]);
    run<Way>(p, false, threads, [&](Way& way, int64_t image, int64_t bands, int64_t band) {
        way.forward(image, band * p.height / bands, (band + 1) * p.height / bands, in, out, static_cast<const T*>(at[5]),
                    static_cast<T*>(at[4]));
    });
}

template <typename Way, typename T> void backward(const Problem& p, int threads, void** at, const int64_t (*strides)[3]) {
    View<T> in[5] = {{at[0], strides[0]}, {at[1], strides[1]}, {at[2], strides[2]}, {at[3], strides[3]}, {at[4], strides[4]}};
    View<T> grad[3] = {{at[5], strides[5]}, {at[6], strides[6]}, {at[7], strides[7]}};
    int64_t bands = p.bands(groups<Way>(p));
    std::vector<T> starts(p.images() * bands * 2 * p.dim), biases(at[9] ? p.images() * bands * p.all() : 0);
    run<Way>(p, true, threads, [&](Way& way, int64_t image, int64_t bands, int64_t band) {
        Sums<T> sums{p, starts.data(), at[9] ? biases.data() : nullptr, bands, band};
        way.backward(image, band * p.height / bands, (band + 1) * p.height / bands, in, grad, static_cast<const T*>(at[9]),
                     static_cast<const T*>(at[8]), sums);
    });
    for (int64_t image = 0; image < p.images(); image++)
        for (int kind = 0; kind < 2; kind++)
            for (int64_t d = 0; d < p.dim; d++) {
                T sum = 0;
                for (int64_t band = 0; band < bands; band++) sum += starts[((image * bands + band) * 2 + kind) * p.dim + d];
                grad[1 + kind].at(image / p.heads, image % p.heads)[d] = sum;
            }
    T* bias_grad = static_cast<T*>(at[10]);
    std::fill(bias_grad, bias_grad + (at[9] ? p.heads * p.all() : 0), T(0));
    for (int64_t job = 0; at[9] && job < p.images() * bands; job++)
        for (int64_t i = 0; i < p.all(); i++) bias_grad[job / bands % p.heads * p.all() + i] += biases[job * p.all() + i];
}

template <typename T> constexpr int LANES = WIDEST / sizeof(T);

// Whether images may be lanes: three quarters of the lanes or more are in use, and what a thread keeps stays in a cache.
template <typename Way, typename T> bool serves(const Problem& p) {
    return 3 * groups<Way>(p) * Way::STEP <= 4 * p.images() && Way::kept(p) * int64_t(sizeof(T)) <= CACHE;
}

// Calls with(a way), which the shape alone decides.  Half a vector of 64 bytes costs little more than half of it.
template <typename T, typename With> void choose(const Problem& p, const With& with) {
    using Whole = Images<T, LANES<T>>;
    using Half = Images<T, LANES<T> / 2>;
    if (serves<Whole, T>(p)) with(static_cast<Whole*>(nullptr));
    else if (WIDEST == 64 && serves<Half, T>(p)) with(static_cast<Half*>(nullptr));
    else if (p.width <= LANES<T> / 2) with(static_cast<Columns<T, LANES<T> / 2>*>(nullptr));
    else with(static_cast<Columns<T, LANES<T>>*>(nullptr));
}

}  // namespace

// shape: batch, heads, height, width, dim, radius; then the scale of the scores.
// forward: q, k, v, out, stats (batch, heads, 2, pixels), bias (heads, offsets) or null.
// backward: q, k, v, gradient of out, out, dq, dk, dv, stats, bias, gradient of the bias.
#define EXPORT(name, T, type)                                                                                     \
    extern "C" int local2d_##name##_##type(const int64_t* s, double scale, int threads, void** at,                \
                                           const int64_t (*strides)[3]) {                                         \
        Problem p{s[0], s[1], s[2], s[3], s[4], s[5], scale};                                                     \
        return guarded([&] {                                                                                      \
            choose<T>(p, [&](auto* way) { name<std::remove_pointer_t<decltype(way)>, T>(p, threads, at, strides); }); \
        });                                                                                                       \
    }
EXPORT(forward, float, float32)
EXPORT(forward, double, float64)
EXPORT(backward, float, float32)
EXPORT(backward, double, float64)
