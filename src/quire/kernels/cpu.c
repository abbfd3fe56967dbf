/* Quire's kernels for CPUs: plain C11, compiled by kernels/cpu.py at first use with the user's own compiler.
 *
 * Knows: raw pointers, strides and sizes. Does not know: torch, Python, sequences' identity, models.
 * Every function has a torch twin of the same meaning in torch_ops.py. Functions that follow indices from memory (block
 * tables, slots, positions) check them and return a negative ERR_ code; cpu.py turns those into exceptions.
 *
 * Letters: T tokens, S sequences, N query heads, K key/value heads, D head size, B blocks.
 * Strides are in elements unless named _bytes. Element types are passed as a dtype code; arithmetic is fp32.
 *
 * Vectors: loops are written so that a compiler vectorises them by itself; only the two inner kernels of attention (the
 * matrix product and the transposition) name vectors, by GCC's vector extension, so that the file also serves AVX2 and
 * ARM. Defining QUIRE_GENERIC leaves out what needs AVX-512, so that the portable path can be tested anywhere.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__AVX512F__) && defined(__AVX512BF16__) && !defined(QUIRE_GENERIC)
#include <immintrin.h>
#define HAVE_BF16_DOT 1 /* one instruction multiplies 32 pairs of bf16 and adds into 16 fp32 sums */
#else
#define HAVE_BF16_DOT 0
#endif
#if defined(__AVX512F__) && !defined(QUIRE_GENERIC)
enum { VL = 16, MICRO_COLS = 4 }; /* floats in a vector; vectors a micro kernel is wide: 6 x 4 sums + 4 + 1 <= 32 registers */
#elif defined(__AVX__)
enum { VL = 8, MICRO_COLS = 2 }; /* 6 x 2 sums + 2 + 1 <= 16 registers */
#else
enum { VL = 4, MICRO_COLS = 4 };
#endif
#if defined(__GNUC__) && !defined(__clang__)
#define UNROLL _Pragma("GCC unroll 8")
#else
#define UNROLL _Pragma("unroll")
#endif
#define INLINE static inline __attribute__((always_inline))

enum { F32 = 0, BF16 = 1, F16 = 2 };
enum { OK = 0, ERR_BLOCK = -1, ERR_BATCH = -2, ERR_MEMORY = -3, ERR_POSITION = -4 };
#ifdef _OPENMP
static int thread_number(void) { return omp_get_thread_num(); }
#else
static int thread_number(void) { return 0; }
#endif
/* Below this many elements a second thread costs more than it saves. */
enum { PARALLEL_MIN = 32768 };

/* ---- element types ---------------------------------------------------------------------------------------------- */

INLINE uint32_t bits_of(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
INLINE float float_of(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }

INLINE float from_bf16(uint16_t h) { return float_of((uint32_t)h << 16); }

INLINE uint16_t to_bf16(float x) { /* to nearest, ties to even; NaN stays NaN */
    uint32_t u = bits_of(x), rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    return (uint16_t)((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

INLINE float from_f16(uint16_t h) {
    /* The shifted bits read as fp32 are the value times 2^-112, subnormals included; infinity and NaN need their exponent back. */
    uint32_t magnitude = h & 0x7fffu, sign = (uint32_t)(h & 0x8000u) << 16;
    uint32_t u = bits_of(float_of(magnitude << 13) * 0x1p112f);
    return float_of(u | (magnitude >= 0x7c00u ? 0x7f800000u : 0u) | sign);
}

INLINE uint16_t to_f16(float x) { /* to nearest, ties to even, branch-free so that it vectorises */
    uint32_t u = bits_of(x) & 0x7fffffffu, sign = (bits_of(x) >> 16) & 0x8000u;
    uint32_t normal = (u - 0x38000000u + 0xfffu + ((u >> 13) & 1u)) >> 13;
    uint32_t tiny = bits_of(float_of(u) + 0.5f) - 0x3f000000u; /* the addition rounds to multiples of 2^-24 */
    uint32_t big = u > 0x7f800000u ? 0x7e00u : 0x7c00u;
    return (uint16_t)(sign | (u >= 0x47800000u ? big : u < 0x38800000u ? tiny : normal));
}

INLINE float load(const void *p, int64_t i, const int dtype) {
    return dtype == F32 ? ((const float *)p)[i] : dtype == BF16 ? from_bf16(((const uint16_t *)p)[i]) : from_f16(((const uint16_t *)p)[i]);
}

INLINE void store(void *p, int64_t i, float x, const int dtype) {
    if (dtype == F32) ((float *)p)[i] = x;
    else if (dtype == BF16) ((uint16_t *)p)[i] = to_bf16(x);
    else ((uint16_t *)p)[i] = to_f16(x);
}

INLINE float rounded(float x, const int dtype) { /* x as it would be after a trip through the element type */
    return dtype == F32 ? x : dtype == BF16 ? from_bf16(to_bf16(x)) : from_f16(to_f16(x));
}

INLINE int64_t bytes_of(int dtype) { return dtype == F32 ? 4 : 2; }

INLINE const char *at(const void *p, int64_t i, int dtype) { return (const char *)p + i * bytes_of(dtype); }

/* Calls an always-inlined function once per element type, with the type a constant, so that its loops vectorise. */
#define FOR_DTYPE(dtype, f, ...)                 \
    switch (dtype) {                             \
    case F32: f(F32, __VA_ARGS__); break;        \
    case BF16: f(BF16, __VA_ARGS__); break;      \
    default: f(F16, __VA_ARGS__);                \
    }

/* e^x to about 2 ulp, 0 below -87.3, at most 2.4e38; exp_f32(0) is 1 exactly; NaN stays NaN. (Cephes' expf.) */
INLINE float exp_f32(float x) {
    float c = x > 88.37f ? 88.37f : x;
    c = c < -87.33f ? -87.33f : c;
    float z = c * 1.44269504f + 12582912.f; /* 1.5 * 2^23: the sum's low bits are round(x / ln 2) */
    float n = z - 12582912.f;
    float r = c - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + (r + 1.f);
    p = p * float_of((bits_of(z) << 23) + 0x3f800000u);
    return x < -87.33f ? 0.f : p;
}

INLINE float tanh_f32(float x) { return 1.f - 2.f / (exp_f32(2.f * x) + 1.f); }

/* ---- rows: norms, activation, rotary, cache writes ---------------------------------------------------------------- */

INLINE void norm_row(const int dtype, const char *x, char *residual, const void *weight, char *out, int64_t size, float eps) {
    float sum = 0.f;
    if (residual) {
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < size; i++) {
            float y = rounded(load(x, i, dtype) + load(residual, i, dtype), dtype);
            store(residual, i, y, dtype);
            sum += y * y;
        }
        x = residual;
    } else {
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < size; i++) {
            float y = load(x, i, dtype);
            sum += y * y;
        }
    }
    float scale = 1.f / sqrtf(sum / (float)size + eps);
#pragma omp simd
    for (int64_t i = 0; i < size; i++)
        store(out, i, load(weight, i, dtype) * rounded(load(x, i, dtype) * scale, dtype), dtype);
}

/* out [T, N, size] contiguous = weight * x / rms(x); residual (or NULL; then [T, N, size] contiguous) becomes x + residual first. */
void quire_rms_norm(int dtype, const void *x, int64_t x_token_stride, int64_t x_head_stride, void *residual, const void *weight,
                    void *out, int64_t tokens, int64_t heads, int64_t size, float eps, int threads) {
#pragma omp parallel for num_threads(threads) if (tokens * heads * size > PARALLEL_MIN)
    for (int64_t row = 0; row < tokens * heads; row++) {
        const char *x_row = at(x, row / heads * x_token_stride + row % heads * x_head_stride, dtype);
        char *residual_row = residual ? (char *)at(residual, row * size, dtype) : NULL;
        char *out_row = (char *)at(out, row * size, dtype);
        FOR_DTYPE(dtype, norm_row, x_row, residual_row, weight, out_row, size, eps);
    }
}

INLINE void silu_row(const int dtype, const char *gate, const char *up, char *out, int64_t size) {
#pragma omp simd
    for (int64_t i = 0; i < size; i++) {
        float g = load(gate, i, dtype);
        store(out, i, rounded(g / (1.f + exp_f32(-g)), dtype) * load(up, i, dtype), dtype);
    }
}

/* out [T, size] = silu(gate_up[:, :size]) * gate_up[:, size:] */
void quire_silu_and_mul(int dtype, const void *gate_up, int64_t token_stride, void *out, int64_t tokens, int64_t size, int threads) {
#pragma omp parallel for num_threads(threads) if (tokens * size > PARALLEL_MIN)
    for (int64_t t = 0; t < tokens; t++) {
        const char *gate = at(gate_up, t * token_stride, dtype);
        FOR_DTYPE(dtype, silu_row, gate, at(gate, size, dtype), (char *)at(out, t * size, dtype), size);
    }
}

INLINE void rotate_head(const int dtype, char *x, const float *cos, const float *sin, int64_t half) {
    char *y = (char *)at(x, half, dtype);
#pragma omp simd
    for (int64_t i = 0; i < half; i++) {
        float a = load(x, i, dtype), b = load(y, i, dtype);
        store(x, i, a * cos[i] - b * sin[i], dtype);
        store(y, i, b * cos[i] + a * sin[i], dtype);
    }
}

/* Rotates the first 2 * half elements of every head of q and k in place; row p of cos_sin holds cos then sin of position p. */
int quire_rotary(int dtype, void *q, int64_t q_token_stride, int64_t q_head_stride, int64_t q_heads, void *k,
                 int64_t k_token_stride, int64_t k_head_stride, int64_t k_heads, const float *cos_sin, int64_t max_positions,
                 int64_t half, const void *positions, int positions_are_64, int64_t tokens, int threads) {
    int status = OK;
#pragma omp parallel for num_threads(threads) if (tokens * (q_heads + k_heads) * half > PARALLEL_MIN / 2)
    for (int64_t t = 0; t < tokens; t++) {
        int64_t position = positions_are_64 ? ((const int64_t *)positions)[t] : ((const int32_t *)positions)[t];
        if (position < 0 || position >= max_positions) {
#pragma omp atomic write
            status = ERR_POSITION;
            continue;
        }
        const float *cos = cos_sin + position * 2 * half;
        for (int64_t h = 0; h < q_heads + k_heads; h++) {
            char *x = (char *)(h < q_heads ? at(q, t * q_token_stride + h * q_head_stride, dtype)
                                           : at(k, t * k_token_stride + (h - q_heads) * k_head_stride, dtype));
            FOR_DTYPE(dtype, rotate_head, x, cos, cos + half, half);
        }
    }
    return status;
}

INLINE void convert_to_f32(const int dtype, const void *x, float *out, int64_t size) {
#pragma omp simd
    for (int64_t i = 0; i < size; i++) out[i] = load(x, i, dtype);
}

INLINE void convert_from_f32(const int dtype, const float *x, void *out, int64_t size) {
#pragma omp simd
    for (int64_t i = 0; i < size; i++) store(out, i, x[i], dtype);
}

static void copy_row(const char *src, int src_dtype, char *dst, int dst_dtype, int64_t size) {
    float wide[256];
    if (src_dtype == dst_dtype) {
        memcpy(dst, src, (size_t)(size * bytes_of(src_dtype)));
        return;
    }
    FOR_DTYPE(src_dtype, convert_to_f32, src, wide, size);
    FOR_DTYPE(dst_dtype, convert_from_f32, wide, dst, size);
}

/* kv[slot's block][0 or 1][head][slot's offset] = k or v of each token, for slots >= 0. */
int quire_write_kv(int dtype, const void *k, int64_t k_token_stride, int64_t k_head_stride, const void *v, int64_t v_token_stride,
                   int64_t v_head_stride, int kv_dtype, void *kv, int64_t block_stride, int64_t num_blocks, int64_t heads,
                   int64_t block_size, int64_t size, const void *slots, int slots_are_64, int64_t tokens, int threads) {
    int status = OK;
#pragma omp parallel for num_threads(threads) if (tokens * heads * size > PARALLEL_MIN)
    for (int64_t t = 0; t < tokens; t++) {
        int64_t slot = slots_are_64 ? ((const int64_t *)slots)[t] : ((const int32_t *)slots)[t];
        if (slot < 0) continue;
        if (slot / block_size >= num_blocks) {
#pragma omp atomic write
            status = ERR_BLOCK;
            continue;
        }
        int64_t place = slot / block_size * block_stride + slot % block_size * size, v_offset = heads * block_size * size;
        for (int64_t h = 0; h < heads; h++, place += block_size * size) {
            copy_row(at(k, t * k_token_stride + h * k_head_stride, dtype), dtype, (char *)at(kv, place, kv_dtype), kv_dtype, size);
            copy_row(at(v, t * v_token_stride + h * v_head_stride, dtype), dtype, (char *)at(kv, place + v_offset, kv_dtype), kv_dtype, size);
        }
    }
    return status;
}

/* dst block dst_ids[i] = src block src_ids[i]; no block may be a destination and a source of the same call. */
int quire_copy_blocks(const char *src, int64_t src_blocks, char *dst, int64_t dst_blocks, int64_t block_bytes, const int64_t *src_ids,
                      const int64_t *dst_ids, int64_t count, int threads) {
    for (int64_t i = 0; i < count; i++)
        if (src_ids[i] < 0 || src_ids[i] >= src_blocks || dst_ids[i] < 0 || dst_ids[i] >= dst_blocks) return ERR_BLOCK;
#pragma omp parallel for num_threads(threads) if (count * block_bytes > 4 * PARALLEL_MIN)
    for (int64_t i = 0; i < count; i++)
        memmove(dst + dst_ids[i] * block_bytes, src + src_ids[i] * block_bytes, (size_t)block_bytes);
    return OK;
}

/* ---- the matrix product inside attention ---------------------------------------------------------------------------
 * C [rows, cols] (+)= A [rows, depth] x B [depth, cols], all in words of 32 bits. A word of A and B is one fp32, or, where
 * `pairs`, two neighbouring bf16 along depth; C is fp32. Both products of attention have this form, with the words of
 * B so arranged by packing: scores = Q K^T (depth: head size) and output = P V (depth: keys).
 * A sum runs along depth in one order, whatever the number of rows and columns: so a query's result does not depend on
 * which other queries share its tile. */

typedef float vec __attribute__((vector_size(VL * 4), aligned(4), may_alias));
enum { MICRO_ROWS = 6 };

INLINE vec multiply_add(const int pairs, vec sum, uint32_t a, vec b) {
#if HAVE_BF16_DOT
    if (pairs) return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)b);
#endif
    (void)pairs;
    return sum + float_of(a) * b;
}

INLINE void micro(const int pairs, const int rows, const int cols, int64_t depth, const uint32_t *a, int64_t a_stride,
                  const uint32_t *b, int64_t b_stride, float *c, int64_t c_stride, int accumulate) {
    vec sums[MICRO_ROWS][MICRO_COLS];
    UNROLL for (int r = 0; r < rows; r++) {
        UNROLL for (int j = 0; j < cols; j++) sums[r][j] = accumulate ? *(const vec *)(c + r * c_stride + j * VL) : (vec){0};
    }
    for (int64_t d = 0; d < depth; d++) {
        vec b_row[MICRO_COLS];
        UNROLL for (int j = 0; j < cols; j++) b_row[j] = *(const vec *)(b + d * b_stride + j * VL);
        UNROLL for (int r = 0; r < rows; r++) {
            UNROLL for (int j = 0; j < cols; j++) sums[r][j] = multiply_add(pairs, sums[r][j], a[r * a_stride + d], b_row[j]);
        }
    }
    UNROLL for (int r = 0; r < rows; r++) {
        UNROLL for (int j = 0; j < cols; j++) *(vec *)(c + r * c_stride + j * VL) = sums[r][j];
    }
}

INLINE void product_cols(const int pairs, const int cols, int64_t rows, int64_t depth, const uint32_t *a, int64_t a_stride,
                         const uint32_t *b, int64_t b_stride, float *c, int64_t c_stride, int accumulate) {
    for (int64_t r = 0; r < rows; r += MICRO_ROWS, a += MICRO_ROWS * a_stride, c += MICRO_ROWS * c_stride) {
#define CASE(n) case n: micro(pairs, n, cols, depth, a, a_stride, b, b_stride, c, c_stride, accumulate); break;
        switch (rows - r) {
            CASE(1) CASE(2) CASE(3) CASE(4) CASE(5)
        default: micro(pairs, 6, cols, depth, a, a_stride, b, b_stride, c, c_stride, accumulate);
        }
#undef CASE
    }
}

INLINE void product(const int pairs, int64_t rows, int64_t cols, int64_t depth, const uint32_t *a, int64_t a_stride,
                    const uint32_t *b, int64_t b_stride, float *c, int64_t c_stride, int accumulate) {
    int64_t j = 0;
    for (; j + MICRO_COLS * VL <= cols; j += MICRO_COLS * VL)
        product_cols(pairs, MICRO_COLS, rows, depth, a, a_stride, b + j, b_stride, c + j, c_stride, accumulate);
    for (; MICRO_COLS > 2 && j + 2 * VL <= cols; j += 2 * VL)
        product_cols(pairs, 2, rows, depth, a, a_stride, b + j, b_stride, c + j, c_stride, accumulate);
    for (; j < cols; j += VL) product_cols(pairs, 1, rows, depth, a, a_stride, b + j, b_stride, c + j, c_stride, accumulate);
}

static void product_f32(int64_t rows, int64_t cols, int64_t depth, const void *a, int64_t a_stride, const uint32_t *b,
                        int64_t b_stride, float *c, int64_t c_stride, int accumulate) {
    product(0, rows, cols, depth, a, a_stride, b, b_stride, c, c_stride, accumulate);
}

#if HAVE_BF16_DOT
static void product_bf16(int64_t rows, int64_t cols, int64_t depth, const void *a, int64_t a_stride, const uint32_t *b,
                         int64_t b_stride, float *c, int64_t c_stride, int accumulate) {
    product(1, rows, cols, depth, a, a_stride, b, b_stride, c, c_stride, accumulate);
}
#else
#define product_bf16 product_f32
#endif

/* ---- attention over a paged cache ------------------------------------------------------------------------------------
 * Flash attention's online softmax (Dao et al. 2022, algorithm 1; merging of splits as in flash-decoding, 2023).
 *
 * One *item* of work: up to ROWS rows (queries of one sequence x query heads that share one KV head) against a range of
 * keys. Keys are read straight through the block table, TILE of them at a time, and packed into the product's order in
 * a scratch that stays in the L1/L2 cache; every row of the item uses the packed tile, so K and V are read from memory once
 * per item. Packing replaces keys that no row may see (beyond the sequence, before the window: there the table points
 * at garbage or the null block) by zeros: so garbage, even NaN, reaches no arithmetic.
 *
 *     keys of a sequence   0        64       128      192      256      320      384  400
 *     tiles                |--------|--------|--------|--------|--------|--------|----|
 *     splits               |--------------- 0 ----------------|----------- 1 ---------|
 *
 * Tiles and splits lie at absolute positions. Each split is computed from nothing and merged, left to right, into what
 * came before it: by one thread when the item covers all splits, by a second pass when the splits were spread over
 * threads. The operations are the same in the same order, so a query's output is bitwise the same whatever else is in the
 * batch, however its prompt was cut into chunks, and on any number of threads. */

enum { TILE = 64, SPLIT = 256, ROWS = 96, GROUP = 16, AHEAD = 64, FIRST_HINT = 32, HINT = 8 };

typedef struct {
    int64_t seq, first, count; /* queries first .. first + count - 1 of sequence seq */
    int64_t split;             /* the one split to do, leaving its result in part; or -1: all, leaving the output */
    int64_t part, num_parts;   /* num_parts: on the first split's item, how many follow each other; else 0 */
} Item;

typedef struct { /* see quire_attention */
    int q_dtype, kv_dtype, pairs, causal, threads;
    const char *q;
    char *out;
    int64_t q_token_stride, q_head_stride;
    const char *kv;
    int64_t block_stride, num_blocks, kv_heads, block_size, head_size;
    int64_t group, heads_per_item, num_head_items, num_heads; /* query heads per KV head; of them in one item; ... */
    const int32_t *query_start, *seq_lens, *tables;
    int64_t table_width, num_seqs;
    float scale, softcap; /* softcap 0: none */
    int64_t window;       /* 0: none */
    int64_t padded_size;  /* head size, rounded up to a whole vector */
    int64_t part_floats, max_rows;
    float *parts;
    int status;
} Attention;

/* Softmax state of the rows of one item over some keys: o = sum of e^(s - m) v, l = sum of e^(s - m), m = max of s. */
typedef struct {
    float *m, *l, *o; /* [rows], [rows], [rows, padded_size] */
} State;

typedef struct {
    uint32_t *q, *k, *v; /* packed words: [rows, D or D/2], [D or D/2, TILE], [TILE or TILE/2, padded_size] */
    float *scores;       /* [rows, TILE] */
    uint16_t *p;         /* [rows, TILE] bf16, where pairs */
    float *wide;         /* [GROUP, D]: keys converted to fp32 */
    State total, split;
} Scratch;

static float *take(uintptr_t *memory, int64_t words) { /* the next piece of an arena, aligned to a cache line */
    uintptr_t piece = *memory;
    *memory += (uintptr_t)(words * 4 + 63) / 64 * 64;
    return (float *)piece;
}

static State take_state(uintptr_t *memory, int64_t rows, int64_t padded_size) {
    State s;
    s.m = take(memory, rows), s.l = take(memory, rows), s.o = take(memory, rows * padded_size);
    return s;
}

static State part_state(const Attention *A, int64_t part) {
    State s;
    s.m = A->parts + part * A->part_floats, s.l = s.m + A->max_rows, s.o = s.l + A->max_rows;
    return s;
}

static void visible_keys(const Attention *A, const Item *it, int64_t *low, int64_t *high) { /* by any query of the item */
    int64_t seq_len = A->seq_lens[it->seq];
    int64_t first = seq_len - (A->query_start[it->seq + 1] - A->query_start[it->seq]) + it->first;
    *high = A->causal ? first + it->count : seq_len;
    *low = A->window && first - A->window + 1 > 0 ? first - A->window + 1 : 0;
}

typedef float vec4 __attribute__((vector_size(16), aligned(4), may_alias));
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
typedef int ivec4 __attribute__((vector_size(16)));
#define SHUFFLE(x, y, ...) __builtin_shuffle(x, y, (ivec4){__VA_ARGS__})
#endif

/* out[w][r] = rows[r][w] for r < GROUP, w < words (a multiple of 4), out's rows TILE words long. */
static void transpose(const char *const *rows, int64_t words, uint32_t *out) {
    for (int64_t w = 0; w < words; w += 4, out += 4 * TILE) {
        UNROLL for (int r = 0; r < GROUP; r += 4) {
            vec4 a = *(const vec4 *)(rows[r] + 4 * w), b = *(const vec4 *)(rows[r + 1] + 4 * w);
            vec4 c = *(const vec4 *)(rows[r + 2] + 4 * w), d = *(const vec4 *)(rows[r + 3] + 4 * w);
            vec4 ab_low = SHUFFLE(a, b, 0, 4, 1, 5), ab_high = SHUFFLE(a, b, 2, 6, 3, 7);
            vec4 cd_low = SHUFFLE(c, d, 0, 4, 1, 5), cd_high = SHUFFLE(c, d, 2, 6, 3, 7);
            *(vec4 *)(out + 0 * TILE + r) = SHUFFLE(ab_low, cd_low, 0, 1, 4, 5);
            *(vec4 *)(out + 1 * TILE + r) = SHUFFLE(ab_low, cd_low, 2, 3, 6, 7);
            *(vec4 *)(out + 2 * TILE + r) = SHUFFLE(ab_high, cd_high, 0, 1, 4, 5);
            *(vec4 *)(out + 3 * TILE + r) = SHUFFLE(ab_high, cd_high, 2, 3, 6, 7);
        }
    }
}

static const char zeros[256 * 4];

/* Where the rows of K and V of keys base .. base + SPLIT - 1 lie; `zeros` for keys outside low .. high - 1. */
static void locate(Attention *A, const Item *it, int64_t kv_head, int64_t base, int64_t low, int64_t high, const char **k, const char **v) {
    const int32_t *table = A->tables + it->seq * A->table_width;
    int64_t row_bytes = A->head_size * bytes_of(A->kv_dtype), v_offset = A->kv_heads * A->block_size * row_bytes;
    int64_t end = high < base + SPLIT ? high : base + SPLIT, key = low > base ? low : base;
    for (int64_t i = base; i < key; i++) k[i - base] = v[i - base] = zeros;
    while (key < end) {
        int64_t index = key / A->block_size, offset = key - index * A->block_size, block = table[index];
        int64_t block_end = (index + 1) * A->block_size < end ? (index + 1) * A->block_size : end;
        const char *row = A->kv + block * A->block_stride * bytes_of(A->kv_dtype) + (kv_head * A->block_size + offset) * row_bytes;
        int64_t step = row_bytes, to_v = v_offset;
        if (block < 0 || block >= A->num_blocks) {
#pragma omp atomic write
            A->status = ERR_BLOCK;
            row = zeros, step = 0, to_v = 0;
        }
        for (; key < block_end; key++, row += step) k[key - base] = row, v[key - base] = row + to_v;
    }
    for (int64_t i = end; i < base + SPLIT; i++) k[i - base] = v[i - base] = zeros;
}

/* Blocks lie scattered: without a hint the first touch of each would wait for memory. A core keeps some two dozen lines in
 * flight, so hints come a few keys at a time between pieces of arithmetic: those for up to key `limit`, `count` at most.
 * They go to the L2 cache: a layer's blocks lie at one offset of their memory pages, so they compete for few sets of the L1. */
INLINE int64_t prefetch(const Attention *A, const char *const *k, const char *const *v, int64_t next, int64_t limit, int64_t count) {
    int64_t row_bytes = A->head_size * bytes_of(A->kv_dtype), end = next + count < limit ? next + count : limit;
    for (; next < end; next++)
        for (int64_t line = 0; line < row_bytes; line += 64)
            __builtin_prefetch(k[next] + line, 0, 2), __builtin_prefetch(v[next] + line, 0, 2);
    return next;
}

/* Brings keys first .. first + GROUP - 1 of a tile into the product's order. */
static void pack_group(const Attention *A, Scratch *s, int64_t first, const char *const *k, const char *const *v) {
    int64_t size = A->head_size, padded = A->padded_size;
    if (A->pairs) {
        transpose(k + first, size / 2, s->k + first);
        for (int64_t i = first; i < first + GROUP; i += 2) {
            const uint16_t *even = (const uint16_t *)v[i], *odd = (const uint16_t *)v[i + 1];
            uint32_t *out = s->v + i / 2 * padded;
            for (int64_t d = 0; d < size; d++) out[d] = (uint32_t)even[d] | (uint32_t)odd[d] << 16;
        }
    } else if (A->kv_dtype == F32) {
        transpose(k + first, size, s->k + first);
        for (int64_t i = first; i < first + GROUP; i++) memcpy(s->v + i * padded, v[i], (size_t)size * 4);
    } else {
        const char *wide[GROUP];
        for (int64_t i = 0; i < GROUP; i++) {
            wide[i] = (const char *)(s->wide + i * size);
            FOR_DTYPE(A->kv_dtype, convert_to_f32, k[first + i], s->wide + i * size, size);
            FOR_DTYPE(A->kv_dtype, convert_to_f32, v[first + i], (float *)s->v + (first + i) * padded, size);
        }
        transpose(wide, size, s->k + first);
    }
}

INLINE float larger(float a, float b) { return a > b ? a : b; }

INLINE float lanes_max(const float *x) {
    float y[4];
    for (int i = 0; i < 4; i++) y[i] = larger(larger(x[i], x[i + 4]), larger(x[i + 8], x[i + 12]));
    return larger(larger(y[0], y[1]), larger(y[2], y[3]));
}

INLINE float lanes_sum(const float *x) {
    float y[4];
    for (int i = 0; i < 4; i++) y[i] = (x[i] + x[i + 4]) + (x[i + 8] + x[i + 12]);
    return (y[0] + y[1]) + (y[2] + y[3]);
}

INLINE float reference_of(float m) { return m == -INFINITY ? 0.f : m; } /* no key seen yet: any finite number serves */

/* One row's scores over a tile -> probabilities (relative to the running maximum), its state rescaled to match.
 * Keys begin .. end - 1 of the tile are seen; keys is a multiple of GROUP. */
static void softmax_row(const Attention *A, State *st, int64_t row, float *scores, uint16_t *p, int64_t keys, int64_t begin, int64_t end) {
    float top[GROUP], sums[GROUP], scale = A->scale;
    for (int i = 0; i < GROUP; i++) top[i] = -INFINITY, sums[i] = 0.f;
    if (A->softcap != 0.f)
        for (int64_t j = 0; j < keys; j++) scores[j] = A->softcap * tanh_f32(scores[j] * scale / A->softcap);
    else
        for (int64_t j = 0; j < keys; j++) scores[j] *= scale;
    if (begin > 0 || end < keys)
        for (int64_t j = 0; j < keys; j++) scores[j] = (j >= begin) & (j < end) ? scores[j] : -INFINITY;
    for (int64_t j = 0; j < keys; j += GROUP)
        for (int i = 0; i < GROUP; i++) top[i] = scores[j + i] > top[i] ? scores[j + i] : top[i];
    float old = st->m[row], highest = lanes_max(top);
    float m = highest > old ? highest : old, reference = reference_of(m);
    for (int64_t j = 0; j < keys; j += GROUP)
        for (int i = 0; i < GROUP; i++) {
            float e = exp_f32(scores[j + i] - reference);
            scores[j + i] = e;
            sums[i] += e;
        }
    if (A->pairs)
        for (int64_t j = 0; j < keys; j++) p[j] = to_bf16(scores[j]);
    float sum = lanes_sum(sums);
    if (m != old) {
        float keep = exp_f32(old - reference), *o = st->o + row * A->padded_size;
        st->m[row] = m;
        st->l[row] *= keep;
        for (int64_t d = 0; d < A->padded_size; d++) o[d] *= keep;
    }
    st->l[row] += sum;
}

/* total becomes the state over total's keys and then next's. */
static __attribute__((noinline)) void merge(State *total, const State *next, int64_t rows, int64_t size) {
    for (int64_t r = 0; r < rows; r++) {
        float m = total->m[r] > next->m[r] ? total->m[r] : next->m[r], reference = reference_of(m);
        float a = exp_f32(total->m[r] - reference), b = exp_f32(next->m[r] - reference);
        float *o = total->o + r * size, *add = next->o + r * size;
        total->m[r] = m;
        total->l[r] = total->l[r] * a + next->l[r] * b;
        for (int64_t d = 0; d < size; d++) o[d] = o[d] * a + add[d] * b;
    }
}

static int64_t rows_of(const Attention *A, const Item *it, int64_t head_item, int64_t *head) {
    int64_t part = head_item % A->num_head_items * A->heads_per_item, left = A->group - part;
    *head = head_item / A->num_head_items * A->group + part;
    return it->count * (left < A->heads_per_item ? left : A->heads_per_item);
}

static void pack_queries(const Attention *A, Scratch *s, const Item *it, int64_t head, int64_t heads) {
    int64_t size = A->head_size;
    for (int64_t r = 0; r < it->count * heads; r++) {
        int64_t token = A->query_start[it->seq] + it->first + r / heads;
        const char *q = at(A->q, token * A->q_token_stride + (head + r % heads) * A->q_head_stride, A->q_dtype);
        if (A->pairs) memcpy((uint16_t *)s->q + r * size, q, (size_t)size * 2);
        else copy_row(q, A->q_dtype, (char *)(s->q + r * size), F32, size);
    }
}

static void attend_split(Attention *A, Scratch *s, State *st, const Item *it, int64_t head, int64_t rows, int64_t split) {
    int64_t heads = rows / it->count, kv_head = head / A->group, size = A->head_size, padded = A->padded_size, low, high;
    int64_t words = A->pairs ? size / 2 : size;
    int64_t first = A->seq_lens[it->seq] - (A->query_start[it->seq + 1] - A->query_start[it->seq]) + it->first;
    const char *k[SPLIT], *v[SPLIT];
    visible_keys(A, it, &low, &high);
    for (int64_t r = 0; r < rows; r++) st->m[r] = -INFINITY, st->l[r] = 0.f;
    memset(st->o, 0, (size_t)(rows * padded) * 4);
    locate(A, it, kv_head, split * SPLIT, low, high, k, v);
    int64_t end_of_split = high - split * SPLIT < SPLIT ? high - split * SPLIT : SPLIT;
    int64_t hinted = prefetch(A, k, v, low > split * SPLIT ? low - split * SPLIT : 0, end_of_split, FIRST_HINT);
    for (int64_t tile = 0; tile < end_of_split; tile += TILE) {
        int64_t base = split * SPLIT + tile, keys = high - base < TILE ? (high - base + GROUP - 1) / GROUP * GROUP : TILE;
        int64_t ahead = tile + TILE + AHEAD < end_of_split ? tile + TILE + AHEAD : end_of_split;
        if (base + TILE <= low) continue;
        for (int64_t g = 0; g < keys; g += GROUP) {
            hinted = prefetch(A, k, v, hinted, ahead, HINT);
            pack_group(A, s, g, k + tile, v + tile);
        }
        (A->pairs ? product_bf16 : product_f32)(rows, keys, words, s->q, words, s->k, TILE, s->scores, TILE, 0);
        for (int64_t r = 0; r < rows; r++) {
            int64_t position = first + r / heads;
            int64_t begin = A->window ? position - A->window + 1 - base : 0, end = (A->causal ? position + 1 : high) - base;
            hinted = prefetch(A, k, v, hinted, ahead, HINT);
            softmax_row(A, st, r, s->scores + r * TILE, s->p + r * TILE, keys, begin, end);
        }
        hinted = prefetch(A, k, v, hinted, ahead, HINT);
        if (A->pairs) product_bf16(rows, padded, keys / 2, s->p, TILE / 2, s->v, padded, st->o, padded, 1);
        else product_f32(rows, padded, keys, s->scores, TILE, s->v, padded, st->o, padded, 1);
    }
}

static void write_output(const Attention *A, const State *st, const Item *it, int64_t head, int64_t rows) {
    int64_t heads = rows / it->count, size = A->head_size;
    for (int64_t r = 0; r < rows; r++) {
        int64_t token = A->query_start[it->seq] + it->first + r / heads;
        char *out = (char *)at(A->out, (token * A->num_heads + head + r % heads) * size, A->q_dtype);
        float *o = st->o + r * A->padded_size, inverse = st->l[r] == 0.f ? 0.f : 1.f / st->l[r];
        for (int64_t d = 0; d < size; d++) o[d] *= inverse;
        FOR_DTYPE(A->q_dtype, convert_from_f32, o, out, size);
    }
}

static void do_item(Attention *A, Scratch *s, const Item *it, int64_t head_item) {
    int64_t head, rows = rows_of(A, it, head_item, &head), low, high;
    pack_queries(A, s, it, head, rows / it->count);
    if (it->split >= 0) {
        State part = part_state(A, it->part * A->kv_heads * A->num_head_items + head_item);
        attend_split(A, s, &part, it, head, rows, it->split);
        return;
    }
    visible_keys(A, it, &low, &high);
    attend_split(A, s, &s->total, it, head, rows, low / SPLIT);
    for (int64_t split = low / SPLIT + 1; split * SPLIT < high; split++) {
        attend_split(A, s, &s->split, it, head, rows, split);
        merge(&s->total, &s->split, rows, A->padded_size);
    }
    write_output(A, &s->total, it, head, rows);
}

static void merge_parts(Attention *A, const Item *it, int64_t head_item) {
    int64_t heads = A->kv_heads * A->num_head_items, head, rows = rows_of(A, it, head_item, &head);
    State total = part_state(A, it->part * heads + head_item);
    for (int64_t i = 1; i < it->num_parts; i++) {
        State next = part_state(A, (it->part + i) * heads + head_item);
        merge(&total, &next, rows, A->padded_size);
    }
    write_output(A, &total, it, head, rows);
}

static Scratch make_scratch(const Attention *A, uintptr_t *memory) {
    Scratch s;
    s.q = (uint32_t *)take(memory, A->max_rows * A->head_size);
    s.k = (uint32_t *)take(memory, TILE * A->head_size);
    s.v = (uint32_t *)take(memory, TILE * A->padded_size);
    s.scores = take(memory, A->max_rows * TILE);
    s.p = (uint16_t *)take(memory, A->max_rows * TILE / 2);
    s.wide = take(memory, GROUP * A->head_size);
    s.total = take_state(memory, A->max_rows, A->padded_size);
    s.split = take_state(memory, A->max_rows, A->padded_size);
    return s;
}

/* Cuts the batch into items. With items NULL only counts: returns an upper bound of their number, and sets *work and max_rows. */
static int64_t cut(Attention *A, Item *items, int64_t *work, int64_t *num_parts, int64_t max_parts) {
    int64_t count = 0, limit = *work * A->kv_heads * A->num_head_items / (8 * A->threads), total = 0, parts = 0;
    int64_t tile = ROWS / A->heads_per_item;
    for (int64_t s = 0; s < A->num_seqs; s++) {
        int64_t queries = A->query_start[s + 1] - A->query_start[s];
        /* the last queries of a chunk see most keys: longest work first keeps the threads busy to the end */
        for (int64_t first = queries > 0 ? (queries - 1) / tile * tile : -1; first >= 0; first -= tile) {
            Item it = {s, first, queries - first < tile ? queries - first : tile, -1, 0, 0};
            int64_t low, high, rows = it.count * A->heads_per_item;
            visible_keys(A, &it, &low, &high);
            int64_t splits = (high - 1) / SPLIT - low / SPLIT + 1;
            int64_t cost = (high - low) * (rows + 8); /* 8: packing a key costs about as much as using it for 8 rows */
            total += cost;
            if (!items) {
                if (rows > A->max_rows) A->max_rows = rows;
                count += splits;
            } else if (cost > limit && splits > 1 && A->threads > 1 && parts + splits <= max_parts) {
                for (int64_t i = 0; i < splits; i++, parts++) {
                    it.split = low / SPLIT + i, it.part = parts, it.num_parts = i == 0 ? splits : 0;
                    items[count++] = it;
                }
            } else {
                items[count++] = it;
            }
        }
    }
    *work = total, *num_parts = parts;
    return count;
}

/* out [T, N, D] contiguous, of q's dtype = attention of q over kv through the block tables.
 * Query i of sequence s is token query_start[s] + i, at position seq_lens[s] - queries + i. kv: see kernels/__init__.py. */
int quire_attention(int q_dtype, const void *q, int64_t q_token_stride, int64_t q_head_stride, void *out, int64_t num_tokens,
                    int64_t num_heads, int kv_dtype, const void *kv, int64_t block_stride, int64_t num_blocks, int64_t kv_heads,
                    int64_t block_size, int64_t head_size, const int32_t *query_start, const int32_t *seq_lens, const int32_t *tables,
                    int64_t table_width, int64_t num_seqs, float scale, float softcap, int64_t window, int causal, int threads) {
    Attention A = {.q_dtype = q_dtype, .kv_dtype = kv_dtype, .pairs = HAVE_BF16_DOT && q_dtype == BF16 && kv_dtype == BF16,
                   .causal = causal, .threads = threads, .q = q, .out = out, .q_token_stride = q_token_stride,
                   .q_head_stride = q_head_stride, .kv = kv, .block_stride = block_stride, .num_blocks = num_blocks,
                   .kv_heads = kv_heads, .block_size = block_size, .head_size = head_size, .group = num_heads / kv_heads,
                   .num_heads = num_heads, .query_start = query_start, .seq_lens = seq_lens, .tables = tables,
                   .table_width = table_width, .num_seqs = num_seqs, .scale = scale, .softcap = softcap, .window = window,
                   .padded_size = (head_size + GROUP - 1) / GROUP * GROUP};
    A.heads_per_item = A.group < ROWS ? A.group : ROWS;
    A.num_head_items = (A.group + A.heads_per_item - 1) / A.heads_per_item;
    if (query_start[0] < 0 || query_start[num_seqs] > num_tokens) return ERR_BATCH;
    for (int64_t s = 0; s < num_seqs; s++) {
        int64_t queries = (int64_t)query_start[s + 1] - query_start[s];
        if (queries < 0 || seq_lens[s] < queries || seq_lens[s] > table_width * block_size) return ERR_BATCH;
    }
    int64_t work = 0, num_parts = 0, heads = kv_heads * A.num_head_items;
    int64_t bound = cut(&A, NULL, &work, &num_parts, 0);
    if (bound == 0) return OK;
    if (work * heads * head_size < 32 * PARALLEL_MIN) threads = A.threads = 1; /* some 20 us: not worth waking others */
    Item *items = malloc((size_t)bound * sizeof(Item));
    if (!items) return ERR_MEMORY;
    A.part_floats = (A.max_rows * (A.padded_size + 2) + 15) / 16 * 16;
    int64_t num_items = cut(&A, items, &work, &num_parts, (64 << 20) / (heads * A.part_floats * 4));
    uintptr_t end = 0;
    make_scratch(&A, &end); /* from address 0: only measures */
    int64_t scratch_bytes = (int64_t)end, parts_bytes = num_parts * heads * A.part_floats * 4;
    char *memory = NULL;
    if (posix_memalign((void **)&memory, 64, (size_t)(threads * scratch_bytes + parts_bytes))) {
        free(items);
        return ERR_MEMORY;
    }
    A.parts = (float *)(memory + threads * scratch_bytes);
#pragma omp parallel num_threads(threads)
    {
        uintptr_t mine = (uintptr_t)memory + (uintptr_t)(thread_number() * scratch_bytes);
        Scratch s = make_scratch(&A, &mine);
        memset(s.v, 0, (size_t)(TILE * A.padded_size) * 4); /* columns beyond the head size: computed, never read, but kept finite */
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < num_items * heads; i++) do_item(&A, &s, &items[i / heads], i % heads);
        if (num_parts > 0) {
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < num_items * heads; i++)
                if (items[i / heads].num_parts > 0) merge_parts(&A, &items[i / heads], i % heads);
        }
    }
    free(memory);
    free(items);
    return A.status;
}
