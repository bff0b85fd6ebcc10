// Sums of outer products that fade: y_t = x_tᵀ M_t, where M_t is the sum of X = a bᵀ of every slot read, each faded.
//
// decay_line, along a sequence, the own slot among those read:
//     M_t = D_t M_{t-1} + X_t,  D_t one number, one for each row of M or one for each of its columns ("lanes").
// decay_solve, along a sequence, D_t one number: the y that are subtracted from b when they are read,
//     y_t = b_t - x_tᵀ D_t M_{t-1},  M_t = D_t M_{t-1} + a_t y_tᵀ.
// decay_grid, over earlier pixels, each faded by λ_row^(r-r') λ_col^|c-c'|:
//     A[r, c] = λ_row (A + X)[r-1, c]                  earlier rows, by column
//     P[r, c] = A[r, c] + λ_col (P + X)[r, c-1]        of them and the own row: what is here or to the left
//     R[r, c] = λ_col (A + R)[r, c+1]                  of them: what is to the right
//     y[r, c] = xᵀ (P + R)
// A row is read twice, from the left for P and from the right for R and the next A.  Started, slot 0 of the keys is the
// start token, which all pixels read unfaded, and slot p + 1 is pixel p; no slot is the last pixel.
//
// All of these times a scale, but for decay_solve.  decay_unit, y = x / √(mean of x² + eps) in every slot.
//
// Turned round, from the last slot to the first, the same sums are over later ones.  That serves all gradients, g being
// that of the output (decay.py has those of decay_solve):
//     out: x = q, a = k, b = v;   dq: x = g, a = v, b = k;   turned, dk: x = v, a = g, b = q;   dv: x = k, a = q, b = g.
// A tile of rows of the matrices by one vector goes over a block of slots, or the grid, in registers; A lies in memory.
#include <cmath>
#include <limits>

#include "jobs.h"
#include "simd.h"

namespace {

enum Fades : int64_t { ONE, BY_ROW, BY_LANE };  // what D_t is

struct Problem {
    int64_t batch, heads, height, width, rows, lanes, turned, fades, started;  // X is rows × lanes: the channels of a and b
    double scale;
    int64_t slots() const { return height * width; }
};

constexpr int64_t BLOCK = 128;  // slots of a line that all tiles serve before they go on

// Slots in the order of the sum, `pitch` numbers from one to the next: negative where it is turned round.
template <typename T> struct Line {
    T* data;
    int64_t pitch;
    T* at(int64_t slot) const { return data + slot * pitch; }
};

template <typename T> struct Tensors {
    View<T> x, a, b, y, fades;  // fades of a line (batch, heads, slots, 1 or rows or lanes), of a grid (1, 1, 2, heads)
    Tensors(void** at, const int64_t (*strides)[3])
        : x(at[0], strides[0]), a(at[1], strides[1]), b(at[2], strides[2]), y(at[3], strides[3]), fades(at[4], strides[4]) {}
};

template <typename T, int LANES> struct Worker {
    using S = Simd<T, LANES>;
    using V = typename S::V;

    const Problem& p;
    const Tensors<T>& in;
    std::vector<T> memory;
    int64_t b = 0, h = 0, lane = 0;  // what it is at work on: a head, and the lanes from `lane` on

    Worker(const Problem& p, const Tensors<T>& in, int64_t vectors)
        : p(p), in(in), memory(vectors * LANES + WIDEST / sizeof(T)) {}

    T* vectors(int64_t first) { return aligned(memory.data()) + first * LANES; }
    int count() const { return int(std::min<int64_t>(LANES, p.lanes - lane)); }

    Line<T> line(const View<T>& x, int64_t slot, int64_t channel) const {
        T* at = x.at(b, h) + channel;
        if (p.turned) return {at + (p.slots() - 1 - slot) * x.slot, -x.slot};
        return {at + slot * x.slot, x.slot};
    }

    // The vectors from `lane` on: where they lie if they are whole, else copied and filled up with zeros.
    template <typename Slots> Slots whole(Slots from, int64_t slots, T* to) const {
        if (count() == LANES) return from;
        for (int64_t i = 0; i < slots; i++) S::store(to + i * LANES, S::load(from.at(i), count()));
        return {to, LANES};
    }

    // D of the slots from `first` on; turned round, what a slot finds has faded by the D of the slot before.  There is
    // none for the first slot, which finds nothing.
    Line<T> decays(int64_t first) const {
        const View<T>& w = in.fades;
        T* at = w.at(b, h) + (p.fades == BY_LANE ? lane : 0);
        if (p.turned) return {at + (p.slots() - first) * w.slot, -w.slot};
        return {at + first * w.slot, w.slot};
    }

    // Rows in tiles of as many as there are, from the largest size on: tile(rows of it, the first).
    template <int... SIZES, typename Tile> void tiles(const Tile& tile) const {
        int64_t first = 0;
        auto by = [&](auto size) {
            for (; p.rows - first >= size.value; first += size.value) tile(size, first);
        };
        (by(std::integral_constant<int, SIZES>{}), ...);
    }
};

template <typename T, int LANES> struct Along : Worker<T, LANES> {
    using Base = Worker<T, LANES>;
    using typename Base::S, typename Base::V;
    using Base::p, Base::in;

    T *matrix, *values, *fades;

    Along(const Problem& p, const Tensors<T>& in) : Base(p, in, p.rows + 2 * BLOCK) {
        matrix = this->vectors(0), values = this->vectors(p.rows), fades = this->vectors(p.rows + BLOCK);
    }

    template <int BY, int N>
    void tile(int64_t first, int64_t slot, int64_t slots, Line<T> b, Line<T> w, T* kept_at) {
        Line<T> x = this->line(in.x, slot, first), a = this->line(in.a, slot, first), y = this->line(in.y, slot, this->lane);
        constexpr int CHAINS = N < 4 ? N : 4;  // sums in parallel hide the latency of an addition
        V kept[N];
        for (int r = 0; r < N; r++) kept[r] = S::load(kept_at + r * LANES);
        for (int64_t i = 0; i < slots; i++) {
            const T *read = x.at(i), *key = a.at(i);
            V value = S::load(b.at(i)), sums[CHAINS]{};
            if (slot + i) {
                const T* fade = w.at(i);
                V all = BY == BY_LANE ? S::load(fade) : S::fill(*fade);
                for (int r = 0; r < N; r++) kept[r] *= BY == BY_ROW ? S::fill(fade[first + r]) : all;
            }
            for (int r = 0; r < N; r++) {
                kept[r] += key[r] * value;
                sums[r % CHAINS] += read[r] * kept[r];
            }
            for (int c = 1; c < CHAINS; c++) sums[0] += sums[c];
            sums[0] *= T(p.scale);
            S::store(y.at(i), first ? sums[0] + S::load(y.at(i), this->count()) : sums[0], this->count());
        }
        for (int r = 0; r < N; r++) S::store(kept_at + r * LANES, kept[r]);
    }

    template <int BY> void by() {
        std::fill_n(matrix, p.rows * LANES, T(0));
        for (int64_t slot = 0; slot < p.slots(); slot += BLOCK) {
            int64_t slots = std::min<int64_t>(BLOCK, p.slots() - slot);
            Line<T> b = this->whole(this->line(in.b, slot, this->lane), slots, values), w = this->decays(slot);
            if (BY == BY_LANE && this->count() < LANES) {
                for (int64_t i = slot == 0; i < slots; i++) S::store(fades + i * LANES, S::load(w.at(i), this->count()));
                w = {fades, LANES};
            }
            this->template tiles<WIDEST >= 64 ? 16 : 8, 8, 4, 1>([&](auto size, int64_t first) {
                tile<BY, size.value>(first, slot, slots, b, w, matrix + first * LANES);
            });
        }
    }

    void work() {
        if (p.fades == ONE) by<ONE>();
        else if (p.fades == BY_ROW) by<BY_ROW>();
        else by<BY_LANE>();
    }
};

template <typename T, int LANES> struct Solve : Worker<T, LANES> {
    using Base = Worker<T, LANES>;
    using typename Base::S, typename Base::V;
    using Base::p, Base::in;

    T* matrix;

    Solve(const Problem& p, const Tensors<T>& in) : Base(p, in, p.rows) { matrix = this->vectors(0); }

    // A slot's y needs all rows of the matrix, which thus lies in memory; it is added when the next slot reads them.
    void work() {
        Line<T> x = this->line(in.x, 0, 0), a = this->line(in.a, 0, 0), w = this->decays(0);
        Line<T> b = this->line(in.b, 0, this->lane), y = this->line(in.y, 0, this->lane);
        std::fill_n(matrix, p.rows * LANES, T(0));
        V last{};
        for (int64_t t = 0; t < p.slots(); t++) {
            const T *read = x.at(t), *key = a.at(std::max<int64_t>(t - 1, 0)), fade = t ? *w.at(t) : T(0);
            V sums[4]{};
            int64_t r = 0;
            auto row = [&](int64_t r, V& sum) {
                V here = fade * (S::load(matrix + r * LANES) + key[r] * last);
                S::store(matrix + r * LANES, here), sum += read[r] * here;
            };
            for (; r + 4 <= p.rows; r += 4)
                for (int i = 0; i < 4; i++) row(r + i, sums[i]);
            for (; r < p.rows; r++) row(r, sums[0]);
            last = S::load(b.at(t), this->count()) - ((sums[0] + sums[1]) + (sums[2] + sums[3]));
            S::store(y.at(t), last, this->count());
        }
    }
};

// A row of pixels in the order of the sum; beyond `least` and `most` stand those.
template <typename T> struct Pixels {
    T* data;
    int64_t pitch, least = std::numeric_limits<int64_t>::min(), most = std::numeric_limits<int64_t>::max();
    T* at(int64_t col) const { return data + std::min(std::max(col, least), most) * pitch; }
};

template <typename T, int LANES> struct Over : Worker<T, LANES> {
    using Base = Worker<T, LANES>;
    using typename Base::S, typename Base::V;
    using Base::p, Base::in;
    enum Start { NONE, READ, SUMMED };  // the start token's matrix: read by every pixel; turned round, their sum

    static constexpr int ROWS = 8;  // of a tile: A of 64 columns then stays in L1
    T *above, *sums, *values;       // A (width, rows of a tile, LANES); y and b of a grid row (width, LANES)

    Over(const Problem& p, const Tensors<T>& in) : Base(p, in, p.width * (ROWS + 2)) {
        above = this->vectors(0), sums = this->vectors(p.width * ROWS), values = this->vectors(p.width * (ROWS + 1));
    }

    // Where started, keys stand a slot later than their pixels.  In the place of the last pixel, which has none, the one
    // before it is read, which serves nobody, or, turned round, written before its own turn comes: with 0, or 0 is added,
    // for nothing precedes the first pixel of the sum.  `most` is -1 in the last row of a width of 1.
    Pixels<T> pixels(const View<T>& x, int64_t slot, int64_t channel, bool keys) const {
        Line<T> own = this->line(x, slot, channel);
        if (!keys || !p.started) return {own.data, own.pitch};
        if (p.turned) return {own.data + x.slot, own.pitch, slot == 0 ? 1 : 0};
        return {own.data + x.slot, own.pitch, -1, slot + p.width == p.slots() ? p.width - 2 : p.width - 1};
    }

    // P from the left: the row's sums over what is here or to the left.
    template <int N, Start START> void from_left(Pixels<T> x, Pixels<T> a, Pixels<T> b, T fade, V (&start)[N]) {
        V kept[N]{};
        for (int64_t col = 0; col < p.width; col++) {
            const T *read = x.at(col), *key = a.at(col), *base = above + col * N * LANES;
            V given = S::load(b.at(col)), value = fade * given, sum[2]{};
            for (int r = 0; r < N; r++) {
                V here = S::load(base + r * LANES) + kept[r];  // P
                sum[r % 2] += read[r] * (START == READ ? here + start[r] : here);
                kept[r] = fade * here + key[r] * value;
                if (START == SUMMED) start[r] += key[r] * given;
            }
            S::store(sums + col * LANES, sum[0] + sum[1]);
        }
    }

    // R from the right, and A for the row below.
    template <int N> void from_right(Pixels<T> x, Pixels<T> a, Pixels<T> b, T fade, T down) {
        V kept[N]{};
        for (int64_t col = p.width - 1; col >= 0; col--) {
            const T *read = x.at(col), *key = a.at(col);
            T* base = above + col * N * LANES;
            V value = down * S::load(b.at(col)), sum[2]{};
            for (int r = 0; r < N; r++) {
                V here = S::load(base + r * LANES);
                sum[r % 2] += read[r] * kept[r];
                kept[r] = fade * (here + kept[r]);
                S::store(base + r * LANES, down * here + key[r] * value);
            }
            S::store(sums + col * LANES, S::load(sums + col * LANES) + sum[0] + sum[1]);
        }
    }

    // Rows from `first` on over the whole grid.
    template <int N, Start START> void tile(int64_t first) {
        const T down = in.fades.data[this->h], fade = in.fades.data[p.heads + this->h], scale = T(p.scale);
        V start[N]{};
        if constexpr (START == READ) {
            V token = S::load(in.b.at(this->b, this->h) + this->lane, this->count());
            for (int r = 0; r < N; r++) start[r] = in.a.at(this->b, this->h)[first + r] * token;
        }
        std::fill_n(above, p.width * N * LANES, T(0));
        auto put = [&](T* y, V sum) {
            S::store(y, first ? scale * sum + S::load(y, this->count()) : scale * sum, this->count());
        };
        for (int64_t slot = 0; slot < p.slots(); slot += p.width) {
            Pixels<T> x = pixels(in.x, slot, first, p.turned), a = pixels(in.a, slot, first, !p.turned);
            Pixels<T> y = pixels(in.y, slot, this->lane, p.turned);
            Pixels<T> b = this->whole(pixels(in.b, slot, this->lane, !p.turned), p.width, values);
            from_left<N, START>(x, a, b, fade, start);
            from_right<N>(x, a, b, fade, down);
            for (int64_t col = 0; col < p.width; col++) put(y.at(col), S::load(sums + col * LANES));
        }
        if (START != SUMMED) return;
        V sum{};
        for (int r = 0; r < N; r++) sum += in.x.at(this->b, this->h)[first + r] * start[r];
        put(in.y.at(this->b, this->h) + this->lane, sum);
    }

    template <Start START> void all() {
        this->template tiles<ROWS, 4, 1>([&](auto size, int64_t first) { tile<size.value, START>(first); });
    }

    void work() {
        if (!p.started) all<NONE>();
        else if (p.turned) all<SUMMED>();
        else all<READ>();
    }
};

template <typename Work, int LANES, typename T> void run(const Problem& p, int threads, const Tensors<T>& in) {
    int64_t across = (p.lanes + LANES - 1) / LANES;
    auto work = [&](Work& worker, int64_t job) {
        worker.b = job / across / p.heads, worker.h = job / across % p.heads, worker.lane = job % across * LANES;
        worker.work();
    };
    share<Work>(threads, p.batch * p.heads * across, work, p, in);
}

template <template <typename, int> class Work, typename T>
void choose(const Problem& p, int threads, void** at, const int64_t (*strides)[3]) {
    constexpr int WHOLE = WIDEST / sizeof(T), HALF = WHOLE / 2;  // a small head would leave half of each vector empty
    Tensors<T> in(at, strides);
    if (p.lanes > HALF) run<Work<T, WHOLE>, WHOLE>(p, threads, in);
    else run<Work<T, HALF>, HALF>(p, threads, in);
}

// A head's slots by their root mean square; with g, the gradient of the result, that of x:
//     (g - x mean(g x) / m) / √m,  m = mean of x² + eps.
template <typename T, int LANES> void unit(const Line<T>& x, const Line<T>* g, const Line<T>& y, int64_t slots, int64_t dim, T eps) {
    using S = Simd<T, LANES>;
    using V = typename S::V;
    auto count = [&](int64_t d) { return int(std::min<int64_t>(LANES, dim - d)); };
    for (int64_t slot = 0; slot < slots; slot += LANES) {  // as many at a time as have their sums in one vector
        V squares[LANES]{}, products[LANES]{}, length, share{};
        int together = int(std::min<int64_t>(LANES, slots - slot));
        for (int i = 0; i < together; i++)
            for (int64_t d = 0; d < dim; d += LANES) {
                V value = S::load(x.at(slot + i) + d, count(d));
                squares[i] += value * value;
                if (g) products[i] += value * S::load(g->at(slot + i) + d, count(d));
            }
        V mean = S::sums(squares) / T(dim) + eps;
        for (int i = 0; i < LANES; i++) length[i] = T(1) / std::sqrt(mean[i]);
        if (g) share = S::sums(products) / T(dim) / mean;
        for (int i = 0; i < together; i++)
            for (int64_t d = 0; d < dim; d += LANES) {
                V value = S::load(x.at(slot + i) + d, count(d));
                if (g) value = S::load(g->at(slot + i) + d, count(d)) - share[i] * value;
                S::store(y.at(slot + i) + d, length[i] * value, count(d));
            }
    }
}

template <typename T> void units(const int64_t* shape, T eps, int threads, View<T> x, const View<T>* g, View<T> y) {
    int64_t batch = shape[0], heads = shape[1], slots = shape[2], dim = shape[3];
    constexpr int WHOLE = WIDEST / sizeof(T), HALF = WHOLE / 2;
    auto by = dim > HALF ? unit<T, WHOLE> : unit<T, HALF>;
    share(threads, batch * heads, [&](int, int64_t job) {
        auto line = [&](const View<T>& from) { return Line<T>{from.at(job / heads, job % heads), from.slot}; };
        Line<T> gradient = line(g ? *g : x);
        by(line(x), g ? &gradient : nullptr, line(y), slots, dim, eps);
    });
}

}  // namespace

// shape: batch, heads, height, width (of a line 1, slots), rows, lanes, turned, fades, started.
// Tensors: x, a, b, y, fades.
#define EXPORT(name, T, type, ...)                                                                             \
    extern "C" int decay_##name##_##type(const int64_t* s, double scale, int threads, void** at,               \
                                         const int64_t (*strides)[3]) {                                        \
        Problem p{s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], scale};                                \
        return guarded([&] { __VA_ARGS__(p, threads, at, strides); });                                         \
    }
EXPORT(line, float, float32, choose<Along, float>)
EXPORT(line, double, float64, choose<Along, double>)
EXPORT(solve, float, float32, choose<Solve, float>)
EXPORT(solve, double, float64, choose<Solve, double>)
EXPORT(grid, float, float32, choose<Over, float>)
EXPORT(grid, double, float64, choose<Over, double>)

// shape: batch, heads, slots, dim.  Tensors: x, y; backward x, gradient of y, that of x.
#define EXPORT_UNIT(name, T, type, BACKWARD)                                                                   \
    extern "C" int decay_##name##_##type(const int64_t* shape, double eps, int threads, void** at,             \
                                         const int64_t (*by)[3]) {                                             \
        View<T> x(at[0], by[0]), g(at[1], by[1]), made(at[1 + BACKWARD], by[1 + BACKWARD]);                    \
        return guarded([&] { units<T>(shape, T(eps), threads, x, BACKWARD ? &g : nullptr, made); });           \
    }
EXPORT_UNIT(unit, float, float32, 0)
EXPORT_UNIT(unit, double, float64, 0)
EXPORT_UNIT(unit_backward, float, float32, 1)
EXPORT_UNIT(unit_backward, double, float64, 1)
