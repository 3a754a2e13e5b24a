/* The loops of preprocessing.pyx: a frame is read four rows at a time, resized across, then down, and cut into patches.
 *
 * Pictures between steps are RGBX: four bytes a pixel, the fourth without meaning, so that a pixel is one 32-bit load
 * that never leaves the buffer. Their rows are padded to whole blocks of LANES values; what stands in the padding is
 * computed and never looked at.
 *
 * Both passes of every filter are the same loop: LANES values side by side, multiplied by one weight per tap. Across,
 * the lanes are four rows of one pixel; down, they are four pixels of one row. Each lane therefore sums its taps in
 * their order, which integers do not care about and floats do.
 *
 * The inner loops exist twice on x86-64, in plain C and for AVX2 with FMA, chosen at run time by the processor: the
 * compiler flags stay those of a wheel that runs anywhere. Both give the same numbers, and a test holds them to it. */

#ifndef CHATVLA_EDGE_RESAMPLING_H
#define CHATVLA_EDGE_RESAMPLING_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { LANES = 16, SIDE = 14, MERGE = 2 };

/* Pixels anywhere in memory: byte strides may have any sign and size. */
typedef struct {
    const uint8_t *origin;
    ptrdiff_t row, column, channel;
    int32_t height, width;
} View;

/* One axis of a resize. Output i sums input[first[i] + k] * weight[i * span + k] over k < count[i]. */
typedef struct {
    int32_t size, span;
    const int32_t *first, *count;
    const int32_t *whole; /* bicubic: 1/2^22, bilinear_cv2: 1/2^11 */
    const float *real;    /* bilinear_float */
} Taps;

typedef struct {
    Taps across, down;
    uint8_t *block; /* [source width][4 rows][RGBX] */
    void *middle;   /* [source height, up to whole fours][stride] values between the passes */
    uint8_t *out;   /* [height][stride] RGBX */
    ptrdiff_t stride; /* values in a row of middle and out: 4 * width, up to whole LANES */
} Resizing;

typedef struct {
    void (*bicubic)(const View *, const Resizing *);
    void (*bilinear_float)(const View *, const Resizing *);
    void (*bilinear_cv2)(const View *, const Resizing *);
} Kernels;

/* Rows y .. y+3 as [width][4][RGBX]; past the last row it is repeated, and the result not looked at. */
static void read_block(const View *view, int32_t y, uint8_t *block) {
    const uint8_t *row[4];
    int32_t x = 0;
    for (int r = 0; r < 4; r++) {
        int32_t at = y + r < view->height ? y + r : view->height - 1;
        row[r] = view->origin + at * view->row;
    }
    /* A 32-bit load of a packed pixel takes a byte of its neighbour along: not allowed at the last one. */
    if (view->channel == 1 && (view->column == 3 || view->column == 4)) {
        for (; x < view->width - 1; x++)
            for (int r = 0; r < 4; r++) memcpy(block + 16 * x + 4 * r, row[r] + x * view->column, 4);
    } else if (view->channel == -1 && (view->column == 3 || view->column == 4)) {
        for (; x < view->width - 1; x++) /* BGR in memory, in a little-endian load: [x R G B] >> 8 once turned round */
            for (int r = 0; r < 4; r++) {
                uint32_t pixel;
                memcpy(&pixel, row[r] + x * view->column - 2, 4);
                pixel = __builtin_bswap32(pixel) >> 8;
                memcpy(block + 16 * x + 4 * r, &pixel, 4);
            }
    }
    for (; x < view->width; x++)
        for (int r = 0; r < 4; r++)
            for (int c = 0; c < 3; c++)
                block[16 * x + 4 * r + c] = row[r][x * view->column + c * view->channel];
}

/* ---- inner loops in plain C: fixed trip counts without aliasing, which compilers vectorise at -O2 */

/* sum = start + bytes * weights, in int32 */
static inline void weigh_plain(
    const uint8_t *restrict values, ptrdiff_t step, const int32_t *restrict weight, int32_t count, int32_t start,
    int32_t *restrict sum
) {
    int32_t s[LANES];
    for (int i = 0; i < LANES; i++) s[i] = start;
    for (int32_t k = 0; k < count; k++, values += step)
        for (int i = 0; i < LANES; i++) s[i] += values[i] * weight[k];
    memcpy(sum, s, sizeof s);
}

/* sum >> 22, held inside 0..255 */
static inline void round_plain(const int32_t *restrict sum, uint8_t *restrict out) {
    uint8_t o[LANES];
    for (int i = 0; i < LANES; i++) {
        int32_t value = sum[i] >> 22;
        value = value < 0 ? 0 : value;
        o[i] = (uint8_t)(value > 255 ? 255 : value);
    }
    memcpy(out, o, sizeof o);
}

/* The sum as PyTorch's AVX2 and AVX-512 builds round it. Its loop over taps is compiled into groups of four, whose
 * products are rounded before they are added one after the other; the up to three taps left over are fused multiply-
 * adds, rounded once. The first tap is a product by itself, outside of the loop. */
#define SUM_AS_TORCH(LOAD)                                                                                             \
    float s[LANES];                                                                                                    \
    int32_t k = 1;                                                                                                     \
    for (int i = 0; i < LANES; i++) s[i] = LOAD(i) * weight[0];                                                        \
    for (values += step; k + 4 <= count; k += 4)                                                                       \
        for (int g = 0; g < 4; g++, values += step)                                                                    \
            for (int i = 0; i < LANES; i++) s[i] += LOAD(i) * weight[k + g];                                           \
    for (; k < count; k++, values += step)                                                                             \
        for (int i = 0; i < LANES; i++) s[i] = fmaf(LOAD(i), weight[k], s[i]);                                         \
    memcpy(sum, s, sizeof s)
#define AS_FLOAT(i) ((float)values[i])

static inline void weigh_bytes_plain(
    const uint8_t *restrict values, ptrdiff_t step, const float *restrict weight, int32_t count, float *restrict sum
) {
    SUM_AS_TORCH(AS_FLOAT);
}

static inline void weigh_floats_plain(
    const float *restrict values, ptrdiff_t step, const float *restrict weight, int32_t count, float *restrict sum
) {
    SUM_AS_TORCH(AS_FLOAT);
}

static inline void truncate_plain(const float *restrict sum, uint8_t *restrict out) {
    uint8_t o[LANES];
    for (int i = 0; i < LANES; i++) o[i] = (uint8_t)(int32_t)sum[i];
    memcpy(out, o, sizeof o);
}

/* OpenCV's way down a column: each product loses its low 16 bits by itself, then both are added and rounded. */
static inline void blend_plain(
    const int16_t *restrict upper, const int16_t *restrict lower, int32_t top, int32_t bottom, uint8_t *restrict out
) {
    uint8_t o[LANES];
    for (int i = 0; i < LANES; i++) {
        int32_t value = ((upper[i] * top >> 16) + (lower[i] * bottom >> 16) + 2) >> 2;
        o[i] = (uint8_t)(value > 255 ? 255 : value);
    }
    memcpy(out, o, sizeof o);
}

#define KERNEL(name) name##_plain
#define TARGET
#include "resampling_passes.h"
#undef KERNEL
#undef TARGET

/* ---- the same for AVX2 */

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#include <immintrin.h>
#define TARGET __attribute__((target("avx2,fma")))
#define KERNEL(name) name##_avx2

TARGET static inline __m256i eight(const uint8_t *bytes) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)bytes));
}

TARGET static inline void weigh_avx2(
    const uint8_t *values, ptrdiff_t step, const int32_t *weight, int32_t count, int32_t start, int32_t *sum
) {
    __m256i low = _mm256_set1_epi32(start), high = low;
    for (int32_t k = 0; k < count; k++, values += step) {
        __m256i w = _mm256_set1_epi32(weight[k]);
        low = _mm256_add_epi32(low, _mm256_mullo_epi32(eight(values), w));
        high = _mm256_add_epi32(high, _mm256_mullo_epi32(eight(values + 8), w));
    }
    _mm256_storeu_si256((__m256i *)sum, low);
    _mm256_storeu_si256((__m256i *)(sum + 8), high);
}

/* Sixteen int32 to bytes in their order, saturated both ways. */
TARGET static inline void pack_avx2(__m256i low, __m256i high, uint8_t *out) {
    __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xD8);
    _mm_storeu_si128(
        (__m128i *)out, _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1))
    );
}

TARGET static inline void round_avx2(const int32_t *sum, uint8_t *out) {
    pack_avx2(
        _mm256_srai_epi32(_mm256_loadu_si256((const __m256i *)sum), 22),
        _mm256_srai_epi32(_mm256_loadu_si256((const __m256i *)(sum + 8)), 22), out
    );
}

#define SUM_AS_TORCH_AVX2(LOW, HIGH)                                                                                   \
    __m256 w = _mm256_set1_ps(weight[0]);                                                                              \
    __m256 low = _mm256_mul_ps(LOW, w), high = _mm256_mul_ps(HIGH, w);                                                 \
    int32_t k = 1;                                                                                                     \
    for (values += step; k + 4 <= count; k += 4)                                                                       \
        for (int g = 0; g < 4; g++, values += step) {                                                                  \
            w = _mm256_set1_ps(weight[k + g]);                                                                         \
            low = _mm256_add_ps(low, _mm256_mul_ps(LOW, w));                                                           \
            high = _mm256_add_ps(high, _mm256_mul_ps(HIGH, w));                                                        \
        }                                                                                                              \
    for (; k < count; k++, values += step) {                                                                           \
        w = _mm256_set1_ps(weight[k]);                                                                                 \
        low = _mm256_fmadd_ps(LOW, w, low);                                                                            \
        high = _mm256_fmadd_ps(HIGH, w, high);                                                                         \
    }                                                                                                                  \
    _mm256_storeu_ps(sum, low);                                                                                        \
    _mm256_storeu_ps(sum + 8, high)

TARGET static inline void weigh_bytes_avx2(
    const uint8_t *values, ptrdiff_t step, const float *weight, int32_t count, float *sum
) {
    SUM_AS_TORCH_AVX2(_mm256_cvtepi32_ps(eight(values)), _mm256_cvtepi32_ps(eight(values + 8)));
}

TARGET static inline void weigh_floats_avx2(
    const float *values, ptrdiff_t step, const float *weight, int32_t count, float *sum
) {
    SUM_AS_TORCH_AVX2(_mm256_loadu_ps(values), _mm256_loadu_ps(values + 8));
}

TARGET static inline void truncate_avx2(const float *sum, uint8_t *out) {
    pack_avx2(_mm256_cvttps_epi32(_mm256_loadu_ps(sum)), _mm256_cvttps_epi32(_mm256_loadu_ps(sum + 8)), out);
}

TARGET static inline void blend_avx2(
    const int16_t *upper, const int16_t *lower, int32_t top, int32_t bottom, uint8_t *out
) {
    __m256i above = _mm256_mulhi_epi16(_mm256_loadu_si256((const __m256i *)upper), _mm256_set1_epi16((short)top));
    __m256i below = _mm256_mulhi_epi16(_mm256_loadu_si256((const __m256i *)lower), _mm256_set1_epi16((short)bottom));
    __m256i sum = _mm256_add_epi16(_mm256_add_epi16(above, below), _mm256_set1_epi16(2));
    __m256i words = _mm256_srai_epi16(sum, 2);
    _mm_storeu_si128(
        (__m128i *)out, _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1))
    );
}

#include "resampling_passes.h"
#undef KERNEL
#undef TARGET

static int has_wide_kernels(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

static Kernels choose_kernels(int wide) {
    Kernels plain = {bicubic_plain, bilinear_float_plain, bilinear_cv2_plain};
    Kernels avx2 = {bicubic_avx2, bilinear_float_avx2, bilinear_cv2_avx2};
    return wide ? avx2 : plain;
}
#else
static int has_wide_kernels(void) { return 0; }

static Kernels choose_kernels(int wide) {
    Kernels plain = {bicubic_plain, bilinear_float_plain, bilinear_cv2_plain};
    (void)wide;
    return plain;
}
#endif

/* ---- steps that only move pixels */

/* Lays a view out as RGBX, `down` rows and `right` columns further; what is uncovered stays as it is (black, from the
 * buffer's beginning), what is pushed over the far edge is lost. */
static void lay_out(const View *view, int32_t down, int32_t right, uint8_t *out, ptrdiff_t stride) {
    for (int32_t y = down; y < view->height; y++) {
        const uint8_t *from = view->origin + (y - down) * view->row;
        uint8_t *to = out + y * stride;
        for (int32_t x = right; x < view->width; x++, from += view->column)
            for (int c = 0; c < 3; c++) to[4 * x + c] = from[c * view->channel];
    }
}

/* [height][width][3] bytes without gaps, as a codec takes them. */
static void pack(const View *view, uint8_t *out) {
    for (int32_t y = 0; y < view->height; y++) {
        const uint8_t *from = view->origin + y * view->row;
        for (int32_t x = 0; x < view->width; x++, from += view->column, out += 3)
            for (int c = 0; c < 3; c++) out[c] = from[c * view->channel];
    }
}

/* [P][3][slices][14][14] normalised: patches of one 2 x 2 merge group stand together, groups row by row.
 * table: [3][256], the normalised value of each grey level of each channel. */
static void cut(const View *view, const float *table, int slices, float *out) {
    enum { AREA = SIDE * SIDE, GROUP = SIDE * MERGE };
    for (int32_t top = 0; top < view->height; top += GROUP)
        for (int32_t left = 0; left < view->width; left += GROUP)
            for (int part = 0; part < MERGE * MERGE; part++) {
                const uint8_t *corner = view->origin + (top + part / MERGE * SIDE) * view->row +
                                        (left + part % MERGE * SIDE) * view->column;
                for (int c = 0; c < 3; c++, out += slices * AREA) {
                    const float *value = table + 256 * c;
                    for (int y = 0; y < SIDE; y++) {
                        const uint8_t *from = corner + y * view->row + c * view->channel;
                        for (int x = 0; x < SIDE; x++) out[SIDE * y + x] = value[from[x * view->column]];
                    }
                    for (int slice = 1; slice < slices; slice++) memcpy(out + slice * AREA, out, AREA * sizeof *out);
                }
            }
}

#endif
