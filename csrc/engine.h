// The engine's C boundary; twin of src/kernels/ffi.rs, where each function is described.
#pragma once

#include <cstdint>

extern "C" {

// A dense tensor; dtype is a c10::ScalarType.
struct RimetView {
  void* data;
  const int64_t* sizes;
  const int64_t* strides;
  int64_t ndim;
  int32_t dtype;
};

// How a tensor is quantized. first and second: contiguous arrays of the compute type (scale and
// offset, or min and max if is_range); null where only shapes are looked at.
struct RimetAffine {
  const void* first;
  const void* second;
  const int64_t* encoding;
  int64_t encoding_ndim;
  const int64_t* block;
  int64_t block_len;  // negative: no block size
  int64_t qmin;
  int64_t qmax;
  double zero_point_shift;
  int32_t op;  // 0 quantize, 1 dequantize, 2 quantize_dequantize
  int32_t is_range;
  int32_t symmetric;
  int32_t double_compute;  // 0 float32, 1 float64
};

// How a tensor is quantized to a floating-point format. scale: a contiguous array of the compute
// type; null where only shapes are looked at.
struct RimetFloat {
  const void* scale;
  const int64_t* encoding;
  int64_t encoding_ndim;
  const int64_t* block;
  int64_t block_len;  // negative: no block size
  int64_t exponent_bits;
  int64_t mantissa_bits;
  int32_t finite;
  int32_t unsigned_zero;
  int32_t dequantize;      // 0 quantize, 1 quantize_dequantize
  int32_t double_compute;  // 0 float32, 1 float64
};

// All functions answer a status: 0 done, 1 value error, 2 type error, 3 other. Pointers stay valid
// during the call only. Outputs have the layout of the input.
const char* rimet_last_error();
int32_t rimet_affine_forward(const RimetAffine*, const RimetView* input, void* output);
int32_t rimet_affine_backward(const RimetAffine*, const RimetView* input, const void* grad,
                              void* grad_input, void* grad_first, void* grad_second);
int32_t rimet_affine_check(const RimetAffine*, const RimetView* input);
int32_t rimet_range_to_scale_offset(const RimetAffine*, int64_t n, void* scale, void* offset);
int32_t rimet_range_to_scale_offset_backward(const RimetAffine*, int64_t n, const void* grad_scale,
                                             const void* grad_offset, void* grad_min,
                                             void* grad_max);
int32_t rimet_min_max(const RimetView* input, const int64_t* encoding, int64_t encoding_ndim,
                      const int64_t* block, int64_t block_len, void* min, void* max);
int32_t rimet_float_format(const RimetFloat*, double* max, int32_t* min_exponent,
                           int32_t* fits_f32);
int32_t rimet_float_forward(const RimetFloat*, const RimetView* input, void* output);
int32_t rimet_float_backward(const RimetFloat*, const RimetView* input, const void* grad,
                             void* grad_input, void* grad_scale);
int32_t rimet_float_check(const RimetFloat*, const RimetView* input);
// shape: the number of groups along each dimension of the contiguous scale. grad and output are
// like it, group_scale and grad_group arrays of its dtype.
int32_t rimet_grouped_block_scale(const RimetView* scale, const int64_t* shape, int64_t levels,
                                  void* output, void* group_scale);
int32_t rimet_grouped_block_scale_backward(const RimetView* scale, const int64_t* shape,
                                           int64_t levels, const void* grad, const void* grad_group,
                                           void* output);

// AdaRound. Every tensor has the input's dtype and layout.
struct RimetAdaroundStep {
  void* alpha;
  void* exp_avg;
  void* exp_avg_sq;
  void* output;
  const void* grad;
  int64_t step;
  double learning_rate;
  double reg_param;
  double beta;
};
int32_t rimet_adaround_forward(const RimetAffine*, const RimetView* input, const void* alpha,
                               int32_t soft, void* output);
int32_t rimet_adaround_backward(const RimetAffine*, const RimetView* input, const void* alpha,
                                const void* grad, void* grad_alpha);
int32_t rimet_adaround_regularizer(const void* alpha, int32_t dtype, int64_t n, double beta,
                                   double* result);
int32_t rimet_adaround_regularizer_backward(const void* alpha, int32_t dtype, int64_t n,
                                            double beta, double grad, void* grad_alpha);
int32_t rimet_adaround_step(const RimetAffine*, const RimetView* input, const RimetAdaroundStep*);

// In place of a contiguous output of n samples with len elements each: factor * (f(output) -
// f(target)) * f'(output), f being ReLU or nothing; samples: their numbers among the target's.
int32_t rimet_reconstruction_gradient(void* output, const void* target, int32_t dtype,
                                      const int64_t* samples, int64_t n, int64_t len, double factor,
                                      int32_t relu);

// Sums along the rows of contiguous arrays: kind 0 (a - b)^2, 1 |a - b|, 2 a * b; b may be null.
int32_t rimet_row_sums(int32_t kind, const void* a, const void* b, int32_t dtype, int64_t rows,
                       int64_t columns, double* sums);

const char* rimet_isa();

// The same on a CUDA device; pointers are to its memory. One more status: 4, there is no kernel
// here.
struct RimetDevice {
  int32_t index;  // torch's number of it; -1 if it is none of CUDA's
  void* stream;
  // Memory of the device for work put on the stream during the call, or null.
  void* (*allocate)(void* owner, int64_t bytes);
  void* owner;
};
int32_t rimet_cuda_affine_forward(const RimetDevice*, const RimetAffine*, const RimetView* input,
                                  void* output);
int32_t rimet_cuda_affine_backward(const RimetDevice*, const RimetAffine*, const RimetView* input,
                                   const void* grad, void* grad_input, void* grad_first,
                                   void* grad_second);
int32_t rimet_cuda_range_to_scale_offset(const RimetDevice*, const RimetAffine*, int64_t n,
                                         void* scale, void* offset);
int32_t rimet_cuda_range_to_scale_offset_backward(const RimetDevice*, const RimetAffine*, int64_t n,
                                                  const void* grad_scale, const void* grad_offset,
                                                  void* grad_min, void* grad_max);
int32_t rimet_cuda_min_max(const RimetDevice*, const RimetView* input, const int64_t* encoding,
                           int64_t encoding_ndim, const int64_t* block, int64_t block_len,
                           void* min, void* max);
int32_t rimet_cuda_float_forward(const RimetDevice*, const RimetFloat*, const RimetView* input,
                                 void* output);
int32_t rimet_cuda_float_backward(const RimetDevice*, const RimetFloat*, const RimetView* input,
                                  const void* grad, void* grad_input, void* grad_scale);
int32_t rimet_cuda_adaround_forward(const RimetDevice*, const RimetAffine*, const RimetView* input,
                                    const void* alpha, int32_t soft, void* output);
int32_t rimet_cuda_adaround_backward(const RimetDevice*, const RimetAffine*, const RimetView* input,
                                     const void* alpha, const void* grad, void* grad_alpha);
int32_t rimet_cuda_adaround_step(const RimetDevice*, const RimetAffine*, const RimetView* input,
                                 const RimetAdaroundStep*);
// result and grad: one element of float32 (float64 for float64 tensors), on the device too.
int32_t rimet_cuda_adaround_regularizer(const RimetDevice*, const void* alpha, int32_t dtype,
                                        int64_t n, double beta, void* result);
int32_t rimet_cuda_adaround_regularizer_backward(const RimetDevice*, const void* alpha,
                                                 int32_t dtype, int64_t n, double beta,
                                                 const void* grad, void* grad_alpha);
// Sample by sample: n elements of both.
int32_t rimet_cuda_reconstruction_gradient(const RimetDevice*, void* output, const void* target,
                                           int32_t dtype, int64_t n, double factor, int32_t relu);
int32_t rimet_cuda_row_sums(const RimetDevice*, int32_t kind, const void* a, const void* b,
                            int32_t dtype, int64_t rows, int64_t columns, double* sums);

// schemas.cpp: see there.
const char* rimet_register_ops();

// In the other direction: the file of libtorch_cpu (cuda.cpp).
const char* rimet_torch_library();
}
