// Decoding: what a block does for one slot of a few images, and one query over scattered keys.
//
// The few rows lie turned, (features, rows), so that the lanes of a vector are images: weights are read once, number by
// number, as they lie, and a norm is a sum of vectors.  Rows are filled up to whole vectors with zeros.
// Rounding does not depend on the number of threads.
#include <algorithm>
#include <cmath>
#include <new>
#include <vector>

#include "simd.h"

namespace {

constexpr int SUMS = WIDEST >= 64 ? 16 : 8;        // vectors that a product keeps in registers
constexpr int64_t WORTH = int64_t(1) << 22;         // FLOPs from which on another thread is worth waking
constexpr double LOG2E = 1.4426950408889634074;

template <typename T> struct Rows {
    static constexpr int LANES = WIDEST / sizeof(T);
    using S = Simd<T, LANES>;
    using V = typename S::V;

    const int64_t rows, vectors, pitch;
    const int threads;

    Rows(int64_t rows, int threads)
        : rows(rows), vectors((rows + LANES - 1) / LANES), pitch(vectors * LANES), threads(threads) {}

    // to[k][row] = from[row][k]
    void turn(const T* from, int64_t width, T* to) const {
        for (int64_t k = 0; k < width; k++)
            for (int64_t row = 0; row < pitch; row++) to[k * pitch + row] = row < rows ? from[row * width + k] : T(0);
    }

    void turn_back(const T* from, int64_t width, T* to) const {
        for (int64_t row = 0; row < rows; row++)
            for (int64_t k = 0; k < width; k++) to[row * width + k] = from[k * pitch + row];
    }

    // to = from / √(mean of from² + eps) · gain
    void norm(const T* from, int64_t width, const T* gain, T eps, T* to) const {
        for (int64_t at = 0; at < pitch; at += LANES) {
            V squares{};
            for (int64_t k = 0; k < width; k++) {
                V x = S::load(from + k * pitch + at);
                squares += x * x;
            }
            V scale;
            for (int lane = 0; lane < LANES; lane++) scale[lane] = 1 / std::sqrt(squares[lane] / T(width) + eps);
            for (int64_t k = 0; k < width; k++)
                S::store(to + k * pitch + at, S::load(from + k * pitch + at) * scale * gain[k]);
        }
    }

    // out[n][row] = finish(Σ_k weight[n][k] x[k][row], n, row) for N neighbouring outputs and one vector of rows.
    template <int N, typename Finish>
    INLINE void tile(const T* weight, int64_t depth, const T* x, T* out, const Finish& finish) const {
        V sums[N]{};
        for (int64_t k = 0; k < depth; k++) {
            V row = S::load(x + k * pitch);
            for (int n = 0; n < N; n++) sums[n] += row * weight[n * depth + k];
        }
        for (int n = 0; n < N; n++) S::store(out + n * pitch, finish(sums[n], out + n * pitch));
    }

    template <typename Finish>
    void product(const T* weight, int64_t width, int64_t depth, const T* x, T* out, const Finish& finish) const {
        int64_t blocks = (width + SUMS - 1) / SUMS;
        int busy = int(std::max<int64_t>(1, std::min<int64_t>(threads, 2 * pitch * width * depth / WORTH)));
#pragma omp parallel for num_threads(busy) if (busy > 1) schedule(static)
        for (int64_t block = 0; block < blocks; block++) {
            int64_t first = block * SUMS;
            for (int64_t at = 0; at < pitch; at += LANES) {
                if (first + SUMS <= width)
                    tile<SUMS>(weight + first * depth, depth, x + at, out + first * pitch + at, finish);
                else
                    for (int64_t n = first; n < width; n++)
                        tile<1>(weight + n * depth, depth, x + at, out + n * pitch + at, finish);
            }
        }
    }

    // norm(x) Wᵀ
    void project(const T* x, const T* gain, const T* weight, int64_t dim, int64_t width, T eps, T* out) const {
        std::vector<T> turned(2 * dim * pitch), wide(width * pitch);
        turn(x, dim, turned.data());
        norm(turned.data(), dim, gain, eps, turned.data() + dim * pitch);
        product(weight, width, dim, turned.data() + dim * pitch, wide.data(), [](V sum, const T*) { return sum; });
        turn_back(wide.data(), width, out);
    }

    // y = x + mixed Wᵀ, and y + down(gelu(up(norm(y)))), where gelu(u) is u·σ(1.702u)
    void finish(const T* x, const T* mixed, const T* weight, const T* gain, const T* up, const T* down, int64_t dim,
                int64_t wide, T eps, T* out) const {
        auto added = [](V sum, const T* before) { return S::load(before) + sum; };
        auto gelu = [](V u, const T*) {
            V e = u * T(-1.702 * LOG2E);
            V most = S::fill(T(std::numeric_limits<T>::max_exponent - 2));
            return u / (S::exp2(e < most ? e : most) + T(1));
        };
        std::vector<T> memory((2 * dim + wide) * pitch);
        T *y = memory.data(), *normed = y + dim * pitch, *inside = normed + dim * pitch;
        turn(x, dim, y);
        turn(mixed, dim, normed);
        product(weight, dim, dim, normed, y, added);
        norm(y, dim, gain, eps, normed);
        product(up, wide, dim, normed, inside, gelu);
        product(down, dim, wide, inside, y, added);
        turn_back(y, dim, out);
    }
};

// softmax(q Kᵀ · scale) V for one query and `count` keys, at places[0], places[1], …
template <typename T> struct Query {
    static constexpr int LANES = WIDEST / sizeof(T);
    using S = Simd<T, LANES>;
    using V = typename S::V;

    std::vector<T> weights, sums;

    Query(int64_t count, int64_t dim) : weights((count + LANES - 1) / LANES * LANES), sums(dim + LANES) {}

    void run(const T* q, const T* k, const T* v, int64_t pitch_k, int64_t pitch_v, const int64_t* places, int64_t count,
             int64_t dim, T scale, T* out) {
        T* w = weights.data();
        T parts[LANES][LANES];
        for (int64_t first = 0; first < count; first += LANES) {
            int here = int(std::min<int64_t>(LANES, count - first));
            for (int key = 0; key < here; key++) {
                const T* row = k + places[first + key] * pitch_k;
                V sum{};
                for (int64_t at = 0; at < dim; at += LANES) {
                    int left = int(dim - at);
                    sum += S::load(q + at, left) * S::load(row + at, left);
                }
                S::store(parts[key], sum);
            }
            V total{};
            for (int lane = 0; lane < LANES; lane++)
                for (int key = 0; key < here; key++) total[key] += parts[key][lane];
            S::store(w + first, total * scale, LANES);
        }
        T peak = *std::max_element(w, w + count), mass = 0;
        for (int64_t key = 0; key < count; key += LANES) S::store(w + key, S::exp2(S::load(w + key) - peak));
        for (int64_t key = 0; key < count; key++) mass += w[key];
        for (int64_t at = 0; at < dim; at += LANES) {
            int left = int(dim - at);
            V sum[4]{};
            int64_t key = 0;
            for (; key + 4 <= count; key += 4)
                for (int i = 0; i < 4; i++) sum[i] += S::load(v + places[key + i] * pitch_v + at, left) * w[key + i];
            for (; key < count; key++) sum[0] += S::load(v + places[key] * pitch_v + at, left) * w[key];
            S::store(out + at, (sum[0] + sum[1] + sum[2] + sum[3]) / mass, left);
        }
    }
};

template <typename T> int project(const int64_t* s, double eps, int threads, void** at) {
    try {
        const T* const* in = reinterpret_cast<const T* const*>(at);
        Rows<T>(s[0], threads).project(in[0], in[1], in[2], s[1], s[2], T(eps), static_cast<T*>(at[3]));
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}

template <typename T> int finish(const int64_t* s, double eps, int threads, void** at) {
    try {
        const T* const* in = reinterpret_cast<const T* const*>(at);
        Rows<T>(s[0], threads).finish(in[0], in[1], in[2], in[3], in[4], in[5], s[1], s[2], T(eps), static_cast<T*>(at[6]));
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}

template <typename T> int attend(const int64_t* s, double scale, int threads, void** at, const int64_t (*strides)[3]) {
    const int64_t batch = s[0], heads = s[1], dim = s[2], count = s[3];
    const int64_t* places = static_cast<const int64_t*>(at[4]);
    const T *q = static_cast<T*>(at[0]), *k = static_cast<T*>(at[1]), *v = static_cast<T*>(at[2]);
    T* out = static_cast<T*>(at[3]);
    // Every number is read for the sake of two FLOPs, so that each takes longer than in a product.
    int busy = int(std::max<int64_t>(1, std::min<int64_t>(threads, 16 * batch * heads * count * dim / WORTH)));
    int failed = 0;
#pragma omp parallel for num_threads(busy) if (busy > 1) schedule(static)
    for (int64_t job = 0; job < batch * heads; job++) {
        int64_t b = job / heads, h = job % heads;
        try {
            Query<T>(count, dim).run(q + b * strides[0][0] + h * strides[0][1], k + b * strides[1][0] + h * strides[1][1],
                                     v + b * strides[2][0] + h * strides[2][1], strides[1][2], strides[2][2], places,
                                     count, dim, T(scale * LOG2E), out + b * strides[3][0] + h * strides[3][1]);
        } catch (const std::bad_alloc&) {
            failed = 1;
        }
    }
    return failed;
}

}  // namespace

// Returns 0, or 1 where memory does not suffice.
// project: shape rows, dim, width; x, gain, weight, out.  finish: shape rows, dim, width inside; x, mixed, weight, gain,
// up, down, out.  Both take whole rows and the norm's eps.
// attend: shape batch, heads, dim, count; q, k, v, out (batch, heads, slots, dim), places.
#define EXPORT(T, type)                                                                                              \
    extern "C" int decode_project_##type(const int64_t* s, double eps, int threads, void** at, const int64_t*) {   \
        return project<T>(s, eps, threads, at);                                                                      \
    }                                                                                                                \
    extern "C" int decode_finish_##type(const int64_t* s, double eps, int threads, void** at, const int64_t*) {    \
        return finish<T>(s, eps, threads, at);                                                                       \
    }                                                                                                                \
    extern "C" int decode_attend_##type(const int64_t* s, double scale, int threads, void** at,                     \
                                        const int64_t (*strides)[3]) {                                               \
        return attend<T>(s, scale, threads, at, strides);                                                            \
    }
EXPORT(float, float32)
EXPORT(double, float64)
