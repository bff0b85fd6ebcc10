// Vectors of LANES numbers of type T, by the compiler's vector extensions (GCC, Clang): no intrinsics, any instruction set.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <utility>

#if defined(__AVX512F__)
constexpr int WIDEST = 64;
#elif defined(__AVX__)
constexpr int WIDEST = 32;
#else
constexpr int WIDEST = 16;
#endif

#define INLINE inline __attribute__((always_inline))

template <typename T> struct Bits;
template <> struct Bits<float> { using type = int32_t; static constexpr int mantissa = 23, degree = 7; };
template <> struct Bits<double> { using type = int64_t; static constexpr int mantissa = 52, degree = 13; };

// Of the series of 2^x: ln2^k/k!.
template <typename T> struct Series {
    T at[Bits<T>::degree + 1];
    constexpr Series() : at{1} {
        long double term = 1;
        for (int k = 1; k <= Bits<T>::degree; k++) at[k] = T(term *= 0.693147180559945309417232121458176568L / k);
    }
};

template <typename T, int LANES> struct Simd {
    typedef T V __attribute__((vector_size(LANES * sizeof(T))));
    typedef typename Bits<T>::type I __attribute__((vector_size(LANES * sizeof(T))));

    static INLINE V load(const T* from) { V v; std::memcpy(&v, from, sizeof v); return v; }
    static INLINE void store(T* to, V v) { std::memcpy(to, &v, sizeof v); }
    static INLINE V fill(T x) { return V{} + x; }
    // The first `count` numbers; the other lanes are zero.
    static INLINE V load(const T* from, int count) {
        if (count >= LANES) return load(from);
        V v{};
        if (count == LANES / 2) std::memcpy(&v, from, sizeof v / 2);  // known in size: one instruction
        else std::memcpy(&v, from, count * sizeof(T));
        return v;
    }
    static INLINE void store(T* to, V v, int count) {
        if (count >= LANES) store(to, v);
        else if (count == LANES / 2) std::memcpy(to, &v, sizeof v / 2);
        else std::memcpy(to, &v, count * sizeof(T));
    }
    // The second where either is no number.
    static INLINE V max(V a, V b) { return a > b ? a : b; }
    static INLINE V min(V a, V b) { return a < b ? a : b; }
    static INLINE T sum(V v) {
        T total = 0;
        for (int i = 0; i < LANES; i++) total += v[i];
        return total;
    }

    // 2^x, exact to the last bits; less than every normal number where 2^x is, 0 from one exponent further down.
    // x must not exceed the largest exponent.
    static INLINE V exp2(V x) {
        constexpr T lowest = std::numeric_limits<T>::min_exponent - 2;  // its exponent's bits are 0: so is the result
        constexpr Series<T> series;
        const T magic = T(3) * (int64_t(1) << (Bits<T>::mantissa - 1));  // adding it rounds to a whole number
        V inside = max(fill(lowest), x);  // in this order what is no number stays so
        V whole = inside + magic;
        V rest = inside - (whole - magic);  // in ±1/2, where Taylor's series converges at once
        V y = fill(series.at[Bits<T>::degree]);
        for (int k = Bits<T>::degree; k > 0; k--) y = y * rest + series.at[k - 1];
        I scaled = (I)y + ((I)whole << Bits<T>::mantissa);
        return (V)scaled;
    }

    template <size_t... i> static INLINE V zip_low(V a, V b, std::index_sequence<i...>) {
        return __builtin_shufflevector(a, b, (i / 2 + i % 2 * LANES)...);
    }
    template <size_t... i> static INLINE V zip_high(V a, V b, std::index_sequence<i...>) {
        return __builtin_shufflevector(a, b, (LANES / 2 + i / 2 + i % 2 * LANES)...);
    }
    // LANES × LANES in place: log2(LANES) rounds of zipping the first half with the second.
    static INLINE void transpose(V (&a)[LANES]) {
        constexpr auto lanes = std::make_index_sequence<LANES>{};
        V b[LANES];
        for (int round = 1; round < LANES; round *= 2) {
            for (int i = 0; i < LANES / 2; i++) {
                b[2 * i] = zip_low(a[i], a[i + LANES / 2], lanes);
                b[2 * i + 1] = zip_high(a[i], a[i + LANES / 2], lanes);
            }
            for (int i = 0; i < LANES; i++) a[i] = b[i];
        }
    }
    // The sum of each vector, in the lane of its number: what is zipped is added at once.
    static INLINE V sums(V (&a)[LANES]) {
        constexpr auto lanes = std::make_index_sequence<LANES>{};
        for (int half = LANES / 2; half; half /= 2)
            for (int i = 0; i < half; i++) a[i] = zip_low(a[i], a[i + half], lanes) + zip_high(a[i], a[i + half], lanes);
        return a[0];
    }
};

// Where whole vectors begin, less than a vector further on: what lies across two cache lines is loaded twice.
template <typename T> T* aligned(T* at) {
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(at) + WIDEST - 1) / WIDEST * WIDEST);
}

// Where a (batch, heads, seq, dim) tensor lies: strides in numbers, that of dim being 1.
template <typename T> struct View {
    T* data;
    int64_t batch, head, slot;
    View(void* at, const int64_t* strides)
        : data(static_cast<T*>(at)), batch(strides[0]), head(strides[1]), slot(strides[2]) {}
    T* at(int64_t b, int64_t h) const { return data + b * batch + h * head; }
};

// What every kernel returns: 0, or 1 where memory does not suffice, for no exception may leave it.
template <typename Work> int guarded(Work work) {
    try {
        work();
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}
