/* The two passes of each filter over the inner loops named by KERNEL(...). Included once per instruction set by
 * resampling.h, hence without a guard: a function that is to be inlined must have its caller's target. */

/* Pillow's: across first, rounded to bytes, then down. 22 fractional bits, and half of one added for the rounding. */
TARGET static void KERNEL(bicubic)(const View *view, const Resizing *r) {
    uint8_t *middle = r->middle;
    int32_t sum[LANES];
    uint8_t grey[LANES];
    for (int32_t y = 0; y < view->height; y += 4) {
        read_block(view, y, r->block);
        for (int32_t x = 0; x < r->across.size; x++) {
            KERNEL(weigh)(
                r->block + LANES * r->across.first[x], LANES, r->across.whole + (ptrdiff_t)x * r->across.span,
                r->across.count[x], 1 << 21, sum
            );
            KERNEL(round)(sum, grey);
            for (int row = 0; row < 4; row++) memcpy(middle + (y + row) * r->stride + 4 * x, grey + 4 * row, 4);
        }
    }
    for (int32_t y = 0; y < r->down.size; y++)
        for (ptrdiff_t x = 0; x < r->stride; x += LANES) {
            KERNEL(weigh)(
                middle + r->down.first[y] * r->stride + x, r->stride, r->down.whole + (ptrdiff_t)y * r->down.span,
                r->down.count[y], 1 << 21, sum
            );
            KERNEL(round)(sum, r->out + y * r->stride + x);
        }
}

/* PyTorch's: across, kept as floats, then down, then truncated as a cast to uint8 does. */
TARGET static void KERNEL(bilinear_float)(const View *view, const Resizing *r) {
    float *middle = r->middle;
    float sum[LANES];
    for (int32_t y = 0; y < view->height; y += 4) {
        read_block(view, y, r->block);
        for (int32_t x = 0; x < r->across.size; x++) {
            KERNEL(weigh_bytes)(
                r->block + LANES * r->across.first[x], LANES, r->across.real + (ptrdiff_t)x * r->across.span,
                r->across.count[x], sum
            );
            for (int row = 0; row < 4; row++)
                memcpy(middle + (y + row) * r->stride + 4 * x, sum + 4 * row, 4 * sizeof *sum);
        }
    }
    for (int32_t y = 0; y < r->down.size; y++)
        for (ptrdiff_t x = 0; x < r->stride; x += LANES) {
            KERNEL(weigh_floats)(
                middle + r->down.first[y] * r->stride + x, r->stride, r->down.real + (ptrdiff_t)y * r->down.span,
                r->down.count[y], sum
            );
            KERNEL(truncate)(sum, r->out + y * r->stride + x);
        }
}

/* OpenCV's: across to 11 fractional bits, of which 7 are kept (at most 255 << 7, an int16), then two taps down. */
TARGET static void KERNEL(bilinear_cv2)(const View *view, const Resizing *r) {
    int16_t *middle = r->middle;
    int32_t sum[LANES];
    for (int32_t y = 0; y < view->height; y += 4) {
        read_block(view, y, r->block);
        for (int32_t x = 0; x < r->across.size; x++) {
            KERNEL(weigh)(
                r->block + LANES * r->across.first[x], LANES, r->across.whole + (ptrdiff_t)x * r->across.span,
                r->across.count[x], 0, sum
            );
            for (int row = 0; row < 4; row++)
                for (int c = 0; c < 4; c++)
                    middle[(y + row) * r->stride + 4 * x + c] = (int16_t)(sum[4 * row + c] >> 4);
        }
    }
    for (int32_t y = 0; y < r->down.size; y++) {
        const int16_t *upper = middle + r->down.first[y] * r->stride;
        /* Beyond the border both taps are the border row and keep their weights. */
        const int16_t *lower = upper + (r->down.count[y] - 1) * r->stride;
        const int32_t *weight = r->down.whole + 2 * (ptrdiff_t)y;
        for (ptrdiff_t x = 0; x < r->stride; x += LANES)
            KERNEL(blend)(upper + x, lower + x, weight[0], weight[1], r->out + y * r->stride + x);
    }
}
