// Decoding: one slot of a few images through the trunk, on to the next mixer that must be asked, or to the logits.
//
// The few rows lie turned, (features, rows), so that the lanes of a vector are images: weights are read once, number by
// number, as they lie, and a norm is a sum of vectors.  Rows are filled up to whole vectors with zeros.
// Threads share out the images and meet only at the end; rounding does not depend on how many there are.
#include <algorithm>
#include <cmath>
#include <vector>

#include "simd.h"

namespace {

constexpr int SUMS = WIDEST >= 64 ? 16 : 8;        // vectors that a product keeps in registers
constexpr int64_t WORTH = int64_t(1) << 22;         // FLOPs from which on another thread is worth waking
constexpr double LOG2E = 1.4426950408889634074;

// What follows is filled in by decode.py, field by field.

template <typename T> struct Matrix {  // (outputs, inputs); the bias may be null
    const T *weight, *bias;
};

template <typename T> struct Layer {
    const T* gain;
    Matrix<T> qkv, gates, out;
    const T* last_gain;
    Matrix<T> up, down;
    int64_t gated, wide;  // outputs of `gates` and `up`
    double eps, last_eps;
};

template <typename T> struct Kept {   // (batch, heads, places, head_dim)
    T *k, *v;                         // null: the mixer must be asked
    const int64_t* places;            // of the keys that the slot sees; null: the first `count`
    const T* scores;                  // (heads, count), what is added to the scores, or null
    const T* turns;                   // (cosines and sines, of q and k, heads, head_dim / 2), or null
    int64_t count, place;             // the slot's own
    int64_t k_strides[3], v_strides[3];
};

template <typename T> struct Job {
    const Layer<T>* layers;
    const Kept<T>* kept;
    const T* gain;
    Matrix<T> head;
    double eps;
    int64_t depth, dim, heads, vocab;
    int64_t threads, rows, first, stop;  // from layer `first` on as far as the mixer of layer `stop`, or to the logits
    const T *x, *mixed;                  // the stream, and where not null what the mixer before `first` made
    T *stream, *out;                     // the stream at `stop`; the projections there, or the logits

    int64_t width() const { return stop < depth ? 3 * dim + layers[stop].gated : vocab; }  // of `out`
};

// softmax(q Kᵀ · scale) V for one query and `count` keys, at places[0], places[1], …, or at 0, 1, …
template <typename T> struct Query {
    static constexpr int LANES = WIDEST / sizeof(T);
    using S = Simd<T, LANES>;
    using V = typename S::V;

    const int64_t* places;
    const int64_t count, dim;
    std::vector<T> weights;

    Query(const int64_t* places, int64_t count, int64_t dim)
        : places(places), count(count), dim(dim), weights((count + LANES - 1) / LANES * LANES) {}

    const T* row(const T* from, int64_t pitch, int64_t key) const { return from + (places ? places[key] : key) * pitch; }

    // Asks for a row long before it is read: rows are too short and too many for the hardware to see them coming.
    void expect(const T* from, int64_t pitch, int64_t key) const {
        for (int64_t at = 0; at < dim; at += 64 / sizeof(T)) __builtin_prefetch(row(from, pitch, key) + at);
    }

    // The scores of the keys from `first` on: products with q, then sums over the lanes; beyond the last key they mean nothing.
    V scores(const T* q, const T* k, int64_t pitch, int64_t first) const {
        V parts[LANES]{};
        const T* rows[LANES];
        for (int64_t key = 0; key < LANES; key++) rows[key] = row(k, pitch, std::min(first + key, count - 1));
        for (int64_t at = 0; at < dim; at += LANES) {
            int left = int(dim - at);
            V query = S::load(q + at, left);
            if (left >= LANES)
                for (int key = 0; key < LANES; key++) parts[key] += query * S::load(rows[key] + at);
            else
                for (int key = 0; key < LANES; key++) parts[key] += query * S::load(rows[key] + at, left);
        }
        return S::sums(parts);
    }

    // `next`: the keys that will be read after these.
    void run(const T* q, const T* k, const T* v, const T* next, int64_t pitch_k, int64_t pitch_v, const T* added, T scale,
             T* out) {
        T* w = weights.data();
        for (int64_t first = 0; first < count; first += LANES) {
            for (int64_t key = first; key < std::min(first + LANES, count); key++) expect(v, pitch_v, key);
            V score = scores(q, k, pitch_k, first) * scale;
            if (added) score += S::load(added + first, int(count - first)) * T(LOG2E);
            for (int64_t lane = count - first; lane < LANES; lane++) score[lane] = -std::numeric_limits<T>::infinity();
            S::store(w + first, score);
        }
        V most = S::load(w), mass{};
        for (int64_t key = LANES; key < count; key += LANES) most = S::max(most, S::load(w + key));
        T peak = most[0];
        for (int lane = 1; lane < LANES; lane++) peak = std::max(peak, most[lane]);
        for (int64_t key = 0; key < count; key += LANES) {
            V weight = S::exp2(S::load(w + key) - peak);
            S::store(w + key, weight);
            mass += weight;
            for (int64_t lane = key; lane < std::min(key + LANES, count); lane++) expect(next, pitch_k, lane);
        }
        T whole = S::sum(mass);
        for (int64_t at = 0; at < dim; at += LANES) {
            int left = int(dim - at);
            V sum[4]{};
            int64_t key = 0;
            for (; key + 4 <= count; key += 4)
                for (int i = 0; i < 4; i++) sum[i] += S::load(row(v, pitch_v, key + i) + at, left) * w[key + i];
            for (; key < count; key++) sum[0] += S::load(row(v, pitch_v, key) + at, left) * w[key];
            S::store(out + at, (sum[0] + sum[1] + sum[2] + sum[3]) / whole, left);
        }
    }
};

// Some of the images, `rows` from `begin` on.
template <typename T, int LANES> struct Rows {
    using S = Simd<T, LANES>;
    using V = typename S::V;

    const Job<T>& job;
    const int64_t begin, rows, vectors, pitch;
    const int threads;

    Rows(const Job<T>& job, int64_t begin, int64_t rows, int threads)
        : job(job), begin(begin), rows(rows), vectors((rows + LANES - 1) / LANES), pitch(vectors * LANES),
          threads(threads) {}

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
    void norm(const T* from, const T* gain, T eps, T* to) const {
        const int64_t dim = job.dim;
        for (int64_t at = 0; at < pitch; at += LANES) {
            V squares{};
            for (int64_t k = 0; k < dim; k++) {
                V x = S::load(from + k * pitch + at);
                squares += x * x;
            }
            V scale{};
            for (int lane = 0; lane < LANES; lane++) scale[lane] = 1 / std::sqrt(squares[lane] / T(dim) + eps);
            for (int64_t k = 0; k < dim; k++)
                S::store(to + k * pitch + at, S::load(from + k * pitch + at) * scale * gain[k]);
        }
    }

    // out[n][row] = finish(bias[n] + Σ_k weight[n][k] x[k][row], n, row), N neighbouring outputs and one vector of rows.
    template <int N, typename Finish>
    INLINE void tile(Matrix<T> by, int64_t n, int64_t depth, const T* x, T* out, const Finish& finish) const {
        const T* weight = by.weight + n * depth;
        V sums[N]{};
        if (by.bias)
            for (int i = 0; i < N; i++) sums[i] = S::fill(by.bias[n + i]);
        for (int64_t k = 0; k < depth; k++) {
            __builtin_prefetch(weight + N * (depth + k));  // a whole tile ahead
            V row = S::load(x + k * pitch);
            for (int i = 0; i < N; i++) sums[i] += row * weight[i * depth + k];
        }
        for (int i = 0; i < N; i++) S::store(out + i * pitch, finish(sums[i], out + i * pitch));
    }

    template <typename Finish>
    void product(Matrix<T> by, int64_t width, int64_t depth, const T* x, T* out, const Finish& finish) const {
        int64_t blocks = (width + SUMS - 1) / SUMS;
        int busy = int(std::max<int64_t>(1, std::min<int64_t>(threads, 2 * pitch * width * depth / WORTH)));
#pragma omp parallel for num_threads(busy) if (busy > 1) schedule(static)
        for (int64_t block = 0; block < blocks; block++) {
            int64_t first = block * SUMS;
            for (int64_t at = 0; at < pitch; at += LANES) {
                if (first + SUMS <= width)
                    tile<SUMS>(by, first, depth, x + at, out + first * pitch + at, finish);
                else
                    for (int64_t n = first; n < width; n++) tile<1>(by, n, depth, x + at, out + n * pitch + at, finish);
            }
        }
    }

    void product(Matrix<T> by, int64_t width, const T* x, T* out) const {
        product(by, width, job.dim, x, out, [](V sum, const T*) { return sum; });
    }

    // Channels p and p + half of a query or key, turned together.
    static void turn_pairs(T* x, const T* cosines, const T* sines, int64_t half) {
        for (int64_t p = 0; p < half; p++) {
            T first = x[p], second = x[p + half];
            x[p] = first * cosines[p] - second * sines[p];
            x[p + half] = second * cosines[p] + first * sines[p];
        }
    }

    // Puts keys and values in their place and attends; projected (rows, 3, dim), mixed (rows, dim).
    void attend(const Kept<T>& kept, T* projected, T* mixed) const {
        const int64_t dim = job.dim, head_dim = dim / job.heads, *ks = kept.k_strides, *vs = kept.v_strides;
        // Every number is read for the sake of two FLOPs, so that each takes longer than in a product.
        int busy = int(std::max<int64_t>(1, std::min<int64_t>(threads, 16 * rows * dim * kept.count / WORTH)));
        int failed = 0;
#pragma omp parallel for num_threads(busy) if (busy > 1) schedule(static)
        for (int64_t each = 0; each < rows * job.heads; each++) {
            int64_t row = each / job.heads, head = each % job.heads;
            T* q = projected + row * 3 * dim + head * head_dim;
            const T *added = kept.scores ? kept.scores + head * kept.count : nullptr, *turns = kept.turns + head * head_dim / 2;
            if (kept.turns) {
                turn_pairs(q, turns, turns + dim, head_dim / 2);
                turn_pairs(q + dim, turns + dim / 2, turns + dim + dim / 2, head_dim / 2);
            }
            T* k = kept.k + (begin + row) * ks[0] + head * ks[1];
            T* v = kept.v + (begin + row) * vs[0] + head * vs[1];
            std::copy_n(q + dim, head_dim, k + kept.place * ks[2]);
            std::copy_n(q + 2 * dim, head_dim, v + kept.place * vs[2]);
            if (guarded([&] {
                const T* next = head + 1 < job.heads ? k + ks[1] : k + ks[0] - head * ks[1];
                Query<T>(kept.places, kept.count, head_dim)
                    .run(q, k, v, next, ks[2], vs[2], added, T(LOG2E / std::sqrt(double(head_dim))),
                         mixed + row * dim + head * head_dim);
            })) failed = 1;
        }
        if (failed) throw std::bad_alloc();
    }

    // x + mixed outᵀ, and from there x + down(gelu(up(norm(x)))), where gelu(u) is u·σ(1.702u); mixed lies turned
    void finish(const Layer<T>& layer, const T* mixed, T* x, T* normed, T* inside) const {
        auto added = [](V sum, const T* before) { return S::load(before) + sum; };
        auto gelu = [](V u, const T*) {
            V e = u * T(-1.702 * LOG2E);
            V most = S::fill(T(std::numeric_limits<T>::max_exponent - 2));
            return u / (S::exp2(e < most ? e : most) + T(1));
        };
        product(layer.out, job.dim, job.dim, mixed, x, added);
        norm(x, layer.last_gain, T(layer.last_eps), normed);
        product(layer.up, layer.wide, job.dim, normed, inside, gelu);
        product(layer.down, job.dim, layer.wide, inside, x, added);
    }

    void run() const {
        const int64_t dim = job.dim;
        int64_t widest = std::max(3 * dim, job.width());
        for (int64_t l = std::max<int64_t>(job.first - 1, 0); l < job.stop; l++) widest = std::max(widest, job.layers[l].wide);
        std::vector<T> memory((3 * dim + widest) * pitch + 4 * dim * rows);
        T *x = memory.data(), *normed = x + dim * pitch, *turned = normed + dim * pitch, *inside = turned + dim * pitch;
        T *projected = inside + widest * pitch, *mixed = projected + 3 * dim * rows;
        turn(job.x + begin * dim, dim, x);
        if (job.mixed) {
            turn(job.mixed + begin * dim, dim, turned);
            finish(job.layers[job.first - 1], turned, x, normed, inside);
        }
        for (int64_t l = job.first; l < job.stop; l++) {
            const Layer<T>& layer = job.layers[l];
            norm(x, layer.gain, T(layer.eps), normed);
            product(layer.qkv, 3 * dim, normed, inside);
            turn_back(inside, 3 * dim, projected);
            attend(job.kept[l], projected, mixed);
            turn(mixed, dim, turned);
            finish(layer, turned, x, normed, inside);
        }
        if (job.stop == job.depth) {
            norm(x, job.gain, T(job.eps), normed);
            product(job.head, job.vocab, normed, inside);
        } else {
            const Layer<T>& layer = job.layers[job.stop];
            norm(x, layer.gain, T(layer.eps), normed);
            product(layer.qkv, 3 * dim, normed, inside);
            product(layer.gates, layer.gated, normed, inside + 3 * dim * pitch);
            turn_back(x, dim, job.stream + begin * dim);
        }
        turn_back(inside, job.width(), job.out + begin * job.width());
    }
};

template <typename T> int step(const Job<T>& job) {
    if (!job.rows) return 0;
    constexpr int FULL = WIDEST / sizeof(T), HALF = WIDEST >= 32 ? FULL / 2 : FULL;
    double work = 2.0 * job.rows * job.dim * job.width();
    for (int64_t l = job.first; l < job.stop; l++)
        work += 2.0 * job.rows * job.dim * (4 * job.dim + 2 * job.layers[l].wide + 8 * job.kept[l].count);
    int64_t groups = std::min({job.threads, (job.rows + HALF - 1) / HALF, std::max<int64_t>(1, int64_t(work / WORTH))});
    int64_t each = (job.rows + groups - 1) / groups;
    int threads = groups > 1 ? 1 : int(job.threads), failed = 0;
#pragma omp parallel for num_threads(groups) if (groups > 1) schedule(static)
    for (int64_t group = 0; group < groups; group++) {
        int64_t begin = group * each, rows = std::min(each, job.rows - begin);
        if (rows <= 0) continue;
        if (guarded([&] {
            // Half the lanes take half the time, or as much, on all but the widest machines.
            if (rows <= HALF) Rows<T, HALF>(job, begin, rows, threads).run();
            else Rows<T, FULL>(job, begin, rows, threads).run();
        })) failed = 1;
    }
    return failed;
}

}  // namespace

// Both return what guarded does: 1 where memory does not suffice.
extern "C" int decode_step_float32(const void* job) { return step(*static_cast<const Job<float>*>(job)); }
extern "C" int decode_step_float64(const void* job) { return step(*static_cast<const Job<double>*>(job)); }
