// Causal linear attention: φ(q)·S / φ(q)·z with S = Σ φ(k) vᵀ and z = Σ φ(k) over the keys no later than the query.
//
// One scan serves all: a matrix grows by an outer product a bᵀ at every slot, and y = xᵀ·matrix is read off.
//     out:   a = φ(k),  b = v,     x = φ(q)            with the slots in order
//     dφ(q): a = v,     b = φ(k),  x = g               in order
//     dφ(k): a = g,     b = φ(q),  x = v               backwards
//     dv:    a = φ(q),  b = g,     x = φ(k)            backwards
// where g is the gradient of the numerator, and in dφ v and g have one row more: ones, and the gradient of the mass.
// A tile of ROWS rows by one vector stays in registers for a block of slots, so that every multiplication is one that
// the definition asks for: 2·width·dim a slot and scan.  Memory O(n·dim): the backward pass scans again.
#include <algorithm>
#include <memory>
#include <new>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "simd.h"

namespace {

struct Problem {
    int64_t batch, heads, seq, width, dim, feature;  // width of φ, dim of v; feature 0: φ(x) = x, 1: elu(x) + 1
    double floor;                                     // the normaliser is at least this
};

constexpr int BLOCK = 64;                       // slots that are handled at a time
constexpr int ROWS = WIDEST >= 64 ? 16 : 8;     // of a tile: as many as registers allow

// A block of slots in working memory: rows of `pitch` numbers, padded with zeros to whole vectors.
template <typename T> struct Rows {
    T* data;
    int64_t pitch;
};

template <typename T> struct Worker {
    static constexpr int LANES = WIDEST / sizeof(T);
    using S = Simd<T, LANES>;
    using V = typename S::V;

    const Problem& p;
    const int64_t m, e;  // width and dim in whole vectors
    std::vector<T> memory;
    Rows<T> q, k, v, g, y;
    T *ones, *slope, *state;

    static int64_t whole(int64_t x) { return (x + LANES - 1) / LANES * LANES; }

    explicit Worker(const Problem& p) : p(p), m(whole(p.width)), e(whole(p.dim)) {
        int64_t wide = std::max(m, e), states = (p.dim + 1) * m + p.width * e;
        memory.resize(BLOCK * (2 * m + 2 * e + wide + 2) + states + LANES);
        T* at = memory.data();
        auto take = [&at](int64_t count) { T* got = at; at += count; return got; };
        q = {take(BLOCK * m), m}, k = {take(BLOCK * m), m}, v = {take(BLOCK * e), e}, g = {take(BLOCK * e), e};
        y = {take(BLOCK * wide), wide};
        ones = take(BLOCK), slope = take(BLOCK), state = take(states);
        std::fill_n(ones, BLOCK, T(1));
    }

    T inverse(T mass) const { return T(1) / (mass < T(p.floor) ? T(p.floor) : mass); }

    static INLINE V feature_of(V x) {
        V low = S::exp2((x > V{} ? V{} : x) * T(1.4426950408889634074));  // what is no number stays none
        return x > V{} ? x + T(1) : low;
    }

    // `count` slots as rows, the features of them if asked.
    void take(const Rows<T>& to, const T* from, int64_t stride, int64_t count, int64_t dim, bool feature) const {
        for (int64_t t = 0; t < count; t++)
            for (int64_t d = 0; d < dim; d += LANES) {
                V x = S::load(from + t * stride + d, int(std::min<int64_t>(LANES, dim - d)));
                if (feature && p.feature) {
                    x = feature_of(x);
                    if (dim - d < LANES)  // elu(0) + 1 is not 0
                        for (int64_t i = dim - d; i < LANES; i++) x[i] = 0;
                }
                S::store(to.data + t * to.pitch + d, x);
            }
    }

    // Rows to slots; `inner`, if given, holds the features whose derivative the rows are multiplied with.
    void put(const Rows<T>& from, T* to, int64_t stride, int64_t count, int64_t dim, const Rows<T>* inner) const {
        for (int64_t t = 0; t < count; t++)
            for (int64_t d = 0; d < dim; d += LANES) {
                V x = S::load(from.data + t * from.pitch + d);
                if (inner && p.feature) {
                    V f = S::load(inner->data + t * inner->pitch + d);
                    x = x * (f > T(1) ? S::fill(1) : f);  // φ' = 1 where x > 0, else exp x = φ
                }
                S::store(to + t * stride + d, x, int(std::min<int64_t>(LANES, dim - d)));
            }
    }

    // A tile of N rows: matrix += a bᵀ, y += xᵀ matrix, slot by slot.
    template <int N, bool BACKWARDS>
    static void tile(T* matrix, int64_t pitch, int64_t count, const T* a, int64_t a_step, const Rows<T>& b, const T* x,
                     int64_t x_step, const Rows<T>& y) {
        constexpr int CHAINS = N < 4 ? N : 4;  // sums in parallel hide the latency of an addition
        V kept[N];
        for (int r = 0; r < N; r++) kept[r] = S::load(matrix + r * pitch);
        for (int64_t i = 0; i < count; i++) {
            int64_t t = BACKWARDS ? count - 1 - i : i;
            V add = S::load(b.data + t * b.pitch), sums[CHAINS]{};
            for (int r = 0; r < N; r++) {
                kept[r] += a[t * a_step + r] * add;
                sums[r % CHAINS] += x[t * x_step + r] * kept[r];
            }
            for (int c = 1; c < CHAINS; c++) sums[0] += sums[c];
            T* to = y.data + t * y.pitch;
            S::store(to, S::load(to) + sums[0]);
        }
        for (int r = 0; r < N; r++) S::store(matrix + r * pitch, kept[r]);
    }

    // The whole matrix (rows, lanes), tile by tile; y must have been set.
    template <bool BACKWARDS>
    static void scan(T* matrix, int64_t rows, int64_t lanes, int64_t count, const T* a, int64_t a_step, Rows<T> b,
                     const T* x, int64_t x_step, Rows<T> y) {
        for (int64_t lane = 0; lane < lanes; lane += LANES) {
            int64_t r = 0;
            auto by = [&](auto n) {
                constexpr int N = decltype(n)::value;
                for (; rows - r >= N; r += N)
                    tile<N, BACKWARDS>(matrix + r * lanes + lane, lanes, count, a + r, a_step, {b.data + lane, b.pitch},
                                       x + r, x_step, {y.data + lane, y.pitch});
            };
            by(std::integral_constant<int, ROWS>{});
            by(std::integral_constant<int, ROWS / 2>{});
            by(std::integral_constant<int, 2>{});
            by(std::integral_constant<int, 1>{});
        }
    }

    void clear(const Rows<T>& rows) const { std::fill_n(rows.data, BLOCK * rows.pitch, T(0)); }

    // Σ over the lanes of each of `count` slots of what `at(slot)` gives.
    template <typename At> static void lane_sums(int64_t count, const At& at, T* to) {
        for (int64_t t = 0; t < count; t += LANES) {
            V x[LANES], sum{};
            for (int i = 0; i < LANES; i++) x[i] = t + i < count ? at(t + i) : V{};
            S::transpose(x);
            for (int i = 0; i < LANES; i++) sum += x[i];
            S::store(to + t, sum, int(std::min<int64_t>(LANES, count - t)));
        }
    }

    void forward(int64_t b, int64_t h, const View<T> (&in)[3], const View<T>& out, T* mass) {
        T *matrix = state, *sums = state + p.width * e;
        std::fill(matrix, sums + m, T(0));
        for (int64_t first = 0; first < p.seq; first += BLOCK) {
            int64_t count = std::min<int64_t>(BLOCK, p.seq - first);
            take(q, in[0].at(b, h) + first * in[0].slot, in[0].slot, count, p.width, true);
            take(k, in[1].at(b, h) + first * in[1].slot, in[1].slot, count, p.width, true);
            take(v, in[2].at(b, h) + first * in[2].slot, in[2].slot, count, p.dim, false);
            clear(y);
            scan<false>(matrix, p.width, e, count, k.data, m, v, q.data, m, y);
            T* masses = mass + (b * p.heads + h) * p.seq + first;
            lane_sums(count, [&](int64_t t) {
                V total{};
                for (int64_t d = 0; d < m; d += LANES) {
                    V sum = S::load(sums + d) + S::load(k.data + t * m + d);
                    S::store(sums + d, sum);
                    total += sum * S::load(q.data + t * m + d);
                }
                return total;
            }, masses);
            for (int64_t t = 0; t < count; t++) {
                V share = S::fill(inverse(masses[t]));
                for (int64_t d = 0; d < e; d += LANES) {
                    T* at = y.data + t * y.pitch + d;
                    S::store(at, S::load(at) * share);
                }
            }
            put(y, out.at(b, h) + first * out.slot, out.slot, count, p.dim, nullptr);
        }
    }

    // q, k, v of a block, and from the gradient of out those of the numerator (g) and of the mass (slope).
    void take_block(int64_t b, int64_t h, int64_t first, int64_t count, const View<T> (&in)[5], const T* mass) {
        take(q, in[0].at(b, h) + first * in[0].slot, in[0].slot, count, p.width, true);
        take(k, in[1].at(b, h) + first * in[1].slot, in[1].slot, count, p.width, true);
        take(v, in[2].at(b, h) + first * in[2].slot, in[2].slot, count, p.dim, false);
        take(g, in[3].at(b, h) + first * in[3].slot, in[3].slot, count, p.dim, false);
        const T* out = in[4].at(b, h) + first * in[4].slot;
        mass += (b * p.heads + h) * p.seq + first;
        for (int64_t t = 0; t < count; t++) {
            V share = S::fill(inverse(mass[t]));
            for (int64_t d = 0; d < e; d += LANES) S::store(g.data + t * e + d, S::load(g.data + t * e + d) * share);
        }
        lane_sums(count, [&](int64_t t) {
            V total{};
            for (int64_t d = 0; d < p.dim; d += LANES)
                total -= S::load(g.data + t * e + d) *
                         S::load(out + t * in[4].slot + d, int(std::min<int64_t>(LANES, p.dim - d)));
            return mass[t] < T(p.floor) ? V{} : total;
        }, slope);
    }

    void backward(int64_t b, int64_t h, const View<T> (&in)[5], const View<T> (&grad)[3], const T* mass) {
        T *matrix = state, *sums = matrix + p.dim * m, *turned = sums + m;
        auto put_at = [&](int64_t which, int64_t first, int64_t count, int64_t dim, const Rows<T>* inner) {
            put(y, grad[which].at(b, h) + first * grad[which].slot, grad[which].slot, count, dim, inner);
        };
        std::fill(matrix, turned, T(0));
        for (int64_t first = 0; first < p.seq; first += BLOCK) {
            int64_t count = std::min<int64_t>(BLOCK, p.seq - first);
            take_block(b, h, first, count, in, mass);
            clear(y);
            scan<false>(matrix, p.dim, m, count, v.data, e, k, g.data, e, y);
            scan<false>(sums, 1, m, count, ones, 1, k, slope, 1, y);
            put_at(0, first, count, p.width, &q);
        }
        std::fill(matrix, turned + p.width * e, T(0));
        for (int64_t first = (p.seq - 1) / BLOCK * BLOCK; first >= 0; first -= BLOCK) {
            int64_t count = std::min<int64_t>(BLOCK, p.seq - first);
            take_block(b, h, first, count, in, mass);
            clear(y);
            scan<true>(matrix, p.dim, m, count, g.data, e, q, v.data, e, y);
            scan<true>(sums, 1, m, count, slope, 1, q, ones, 1, y);
            put_at(1, first, count, p.width, &k);
            clear(y);
            scan<true>(turned, p.width, e, count, q.data, m, g, k.data, m, y);
            put_at(2, first, count, p.dim, nullptr);
        }
    }
};

template <typename T, typename Head> int run(const Problem& p, int threads, const Head& head) {
    int64_t jobs = p.batch * p.heads;
    threads = int(std::max<int64_t>(1, std::min<int64_t>(threads, jobs)));
    std::vector<std::unique_ptr<Worker<T>>> workers(threads);
    try {
        for (auto& worker : workers) worker = std::make_unique<Worker<T>>(p);
    } catch (const std::bad_alloc&) {
        return 1;
    }
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t job = 0; job < jobs; job++) {
#ifdef _OPENMP
        Worker<T>& worker = *workers[omp_get_thread_num()];
#else
        Worker<T>& worker = *workers[0];
#endif
        head(worker, job / p.heads, job % p.heads);
    }
    return 0;
}

template <typename T> int forward(const Problem& p, int threads, void** at, const int64_t (*strides)[3]) {
    View<T> in[3] = {{at[0], strides[0]}, {at[1], strides[1]}, {at[2], strides[2]}}, out(at[3], strides[3]);
    return run<T>(p, threads, [&](Worker<T>& worker, auto b, auto h) {
        worker.forward(b, h, in, out, static_cast<T*>(at[4]));
    });
}

template <typename T> int backward(const Problem& p, int threads, void** at, const int64_t (*strides)[3]) {
    View<T> in[5] = {{at[0], strides[0]}, {at[1], strides[1]}, {at[2], strides[2]}, {at[3], strides[3]}, {at[4], strides[4]}};
    View<T> grad[3] = {{at[5], strides[5]}, {at[6], strides[6]}, {at[7], strides[7]}};
    return run<T>(p, threads, [&](Worker<T>& worker, auto b, auto h) {
        worker.backward(b, h, in, grad, static_cast<const T*>(at[8]));
    });
}

}  // namespace

// shape: batch, heads, seq, width, dim, feature; then the floor.  Returns 0, or 1 where memory does not suffice.
// forward: q, k, v, out, mass (batch, heads, seq).  backward: q, k, v, gradient of out, out, dq, dk, dv, mass.
#define EXPORT(name, T, type)                                                                                       \
    extern "C" int linear_##name##_##type(const int64_t* s, double floor, int threads, void** at,                \
                                           const int64_t (*strides)[3]) {                                          \
        Problem p{s[0], s[1], s[2], s[3], s[4], s[5], floor};                                                      \
        return name<T>(p, threads, at, strides);                                                                    \
    }
EXPORT(forward, float, float32)
EXPORT(forward, double, float64)
EXPORT(backward, float, float32)
EXPORT(backward, double, float64)
