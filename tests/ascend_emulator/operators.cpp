// libopapi.so: the kernels. torch_npu looks an operator up by name, as the pair aclnnXGetWorkspaceSize(arguments...,
// &workspace, &executor) and aclnnX(workspace, size, executor, stream); libtorch's CPU operators do the work here.
// An operator is one line: OPERATOR(name, (parameters), what is done), or KERNEL(name, function) where that takes more
// than one statement.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>
#include <c10/core/InferenceMode.h>

#include <chrono>
#include <cmath>
#include <limits>
#include <mutex>
#include <set>
#include <string_view>
#include <thread>
#include <tuple>

#include "emulator.h"

using namespace emulator;
using at::Scalar;
using at::Tensor;
using Clock = std::chrono::steady_clock;

// ---- the arguments: opaque to torch_npu, ours ----------------------------------------------------------------------

struct aclTensor { Tensor value; };
struct aclTensorList { std::vector<Tensor> value; };
struct aclScalar { Scalar value; };
struct aclIntArray { std::vector<int64_t> value; };
using aclnnStatus = aclError;

struct Out { Tensor t; };  // the output of an operator: where faults strike, and whose rows take time
using Tensors = std::vector<Tensor>;
using Ints = std::vector<int64_t>;
using Text = std::string;
using MaybeScalar = std::optional<Scalar>;

static at::ScalarType dtype_of(aclDataType type) {
  switch (type) {
    case ACL_FLOAT: return at::kFloat;
    case ACL_FLOAT16: return at::kHalf;
    case ACL_BF16: return at::kBFloat16;
    case ACL_DOUBLE: return at::kDouble;
    case ACL_INT8: return at::kChar;
    case ACL_UINT8: return at::kByte;
    case ACL_INT16: return at::kShort;
    case ACL_INT32: return at::kInt;
    case ACL_INT64: return at::kLong;
    case ACL_BOOL: return at::kBool;
    case ACL_COMPLEX64: return at::kComplexFloat;
    case ACL_COMPLEX128: return at::kComplexDouble;
    default: TORCH_CHECK(false, "no data type ", int(type));
  }
}

template <class T> static aclnnStatus destroy(const T* argument) {
  delete argument;
  return ACL_SUCCESS;
}

extern "C" {

aclTensor* aclCreateTensor(const int64_t* sizes, uint64_t dim, aclDataType type, const int64_t* strides, int64_t offset,
                           aclFormat, const int64_t*, uint64_t, void* data) {
  at::ScalarType dtype = dtype_of(type);
  char* start = static_cast<char*>(data) + offset * c10::elementSize(dtype);
  return new aclTensor{at::from_blob(start, {sizes, dim}, {strides, dim}, at::TensorOptions(dtype))};
}

aclTensorList* aclCreateTensorList(const aclTensor* const* tensors, uint64_t size) {
  auto list = new aclTensorList;
  for (uint64_t i = 0; i < size; ++i) {
    list->value.push_back(tensors[i] ? tensors[i]->value : Tensor());
    delete tensors[i];  // the list owns them: torch_npu destroys the list alone
  }
  return list;
}

aclScalar* aclCreateScalar(void* value, aclDataType type) {
  return new aclScalar{at::from_blob(value, {}, at::TensorOptions(dtype_of(type))).item()};
}

aclIntArray* aclCreateIntArray(const int64_t* values, uint64_t n) { return new aclIntArray{{values, values + n}}; }

aclnnStatus aclGetViewShape(const aclTensor* tensor, int64_t** sizes, uint64_t* dim) {
  *dim = tensor->value.dim();
  *sizes = new int64_t[*dim];  // the caller deletes it
  std::copy_n(tensor->value.sizes().begin(), *dim, *sizes);
  return ACL_SUCCESS;
}

aclnnStatus aclDestroyTensor(const aclTensor* p) { return destroy(p); }
aclnnStatus aclDestroyTensorList(const aclTensorList* p) { return destroy(p); }
aclnnStatus aclDestroyScalar(const aclScalar* p) { return destroy(p); }
aclnnStatus aclDestroyIntArray(const aclIntArray* p) { return destroy(p); }

}  // extern "C"

// How a kernel's parameter of type T arrives (Abi), and what is kept of it: torch_npu destroys its arguments before the
// kernel has run, and a graph runs it again long after.
template <class T> struct Argument {
  using Abi = T;
  static T keep(T value) { return value; }
};
template <class T, class Acl> struct Opaque {
  using Abi = const Acl*;
  static T keep(Abi argument) { return argument ? T{argument->value} : T{}; }
};
template <> struct Argument<Tensor> : Opaque<Tensor, aclTensor> {};
template <> struct Argument<Out> : Opaque<Out, aclTensor> {};
template <> struct Argument<Tensors> : Opaque<Tensors, aclTensorList> {};
template <> struct Argument<Scalar> : Opaque<Scalar, aclScalar> {};
template <> struct Argument<MaybeScalar> : Opaque<MaybeScalar, aclScalar> {};
template <> struct Argument<Ints> : Opaque<Ints, aclIntArray> {};
template <> struct Argument<Text> {
  using Abi = const char*;
  static Text keep(Abi text) { return text; }
};

// ---- from the call to the stream -----------------------------------------------------------------------------------

struct aclOpExecutor {
  const char* name;
  Tensor output;
  Work compute;
};

static thread_local bool rounded_to_hf32 = false;  // by the kernel that this thread executes

static void spoil(const Fault& fault, const Tensor& output) {
  if (!output.is_floating_point() || !output.numel()) return;
  Tensor element = output;  // the first one of the middle row: of an image in the midst of a batch
  for (bool middle = true; element.dim(); middle = false) element = element.select(0, middle ? element.size(0) / 2 : 0);
  switch (fault.kind) {
    case Fault::nan: element.fill_(std::numeric_limits<double>::quiet_NaN()); break;
    case Fault::inf: element.fill_(std::numeric_limits<double>::infinity()); break;
    case Fault::element: element.add_(fault.value); break;
    case Fault::scale: output.mul_(fault.value); break;
    case Fault::offset: output.add_(fault.value); break;
    default: break;
  }
}

// The faults that strike this call of the operator, when it is launched (`error`) or when it runs (all others).
static std::vector<const Fault*> count_and_strike(const aclOpExecutor& kernel, int device, bool at_launch) {
  std::vector<const Fault*> struck;
  for (const Fault& fault : knobs().faults) {
    bool meant = (fault.kind == Fault::error) == at_launch && (fault.op == "*" || fault.op == kernel.name);
    if (meant && fault.when.count_and_strike(device)) struck.push_back(&fault);
  }
  return struck;
}

// Operators that do not round give the same bits on every device, so PERTURB leaves them alone.
static const auto& exact = immortal<std::set<std::string>>(std::initializer_list<std::string>{
    "Relu", "InplaceRelu", "Hardtanh", "InplaceHardtanh", "Clamp", "ClampMin", "ClampMax", "NanToNum", "Maximum",
    "Minimum", "Neg", "Abs", "Sign", "Trunc", "Floor", "InplaceFloor", "Ceil", "InplaceCeil", "Round", "FloorDivide",
    "FloorDivides", "DivMod", "DivMods", "MaxPool2dWithMask", "MaxPool2dWithIndices", "Amax", "Amin", "Max", "Min",
    "MaxDim", "MinDim", "Median", "Topk", "Sort", "SWhere", "InplaceMaskedFillScalar", "InplaceMaskedFillTensor",
    "Cast", "InplaceCopy", "InplaceZero", "InplaceOne", "InplaceFillScalar", "InplaceFillTensor", "InplaceNormal",
    "InplaceUniform", "Arange", "Eye", "Linspace", "Cat", "Stack", "Repeat", "Roll", "Flip", "Tril", "Triu",
    "ConstantPadNd", "Embedding", "IndexSelect", "Gather", "Index", "UpsampleNearest2dV2", "MaskedSelect",
    "Im2col"});

// From -1 to 1, by the finaliser of splitmix64: neighbouring arguments give unrelated results.
static double noise(uint64_t x) {
  x *= 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return double((x ^ (x >> 31)) >> 11) * 0x1p-52 - 1;
}

// The noise is the same in every row of dimension 0, so that an image gives the same alone and in a batch.
static void perturb(const aclOpExecutor& kernel) {
  const Tensor& output = kernel.output;
  if (!knobs().perturb || exact.count(kernel.name) || !output.is_floating_point()) return;
  uint64_t seed = std::hash<std::string_view>()(kernel.name);
  Tensor factors = at::empty(output.sizes().slice(output.dim() ? 1 : 0), at::kDouble);
  double* factor = factors.mutable_data_ptr<double>();
  for (int64_t i = 0; i < factors.numel(); ++i) factor[i] = 1 + knobs().perturb * noise(seed + i);
  output.copy_(output.to(at::kDouble).mul_(factors));
}

static void execute(const aclOpExecutor& kernel, int device) {
  auto start = Clock::now();
  c10::InferenceMode no_autograd;
  at::init_num_threads();  // torch.set_num_threads holds for the caller's thread only
  count_kernel(kernel.name);
  auto faults = count_and_strike(kernel, device, false);
  rounded_to_hf32 = false;
  for (const Fault* fault : faults) {
    if (fault->kind == Fault::hang)
      for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
    if (fault->kind == Fault::async_error)
      throw KernelError(aclError(fault->value), "The error from device " + std::to_string(device) + ": kernel aclnn" +
                                                    kernel.name + " failed, as ASCEND_EMULATOR_FAULT asks");
  }
  try {
    kernel.compute();
  } catch (const c10::Error& e) {
    throw std::runtime_error("aclnn" + std::string(kernel.name) + ": " + e.what_without_backtrace());
  }
  perturb(kernel);
  for (const Fault* fault : faults)
    if (rounded_to_hf32 || !fault->when.hf32) spoil(*fault, kernel.output);

  bool half = kernel.output.defined() && kernel.output.element_size() == 2;
  const KernelTime* time = nullptr;
  for (const Text& name : {half ? "half:" + Text(kernel.name) : Text(), Text(kernel.name), Text("*")})
    for (const KernelTime& one : knobs().kernel_times)
      if (!time && one.op == name && (one.device < 0 || one.device == device)) time = &one;
  if (!time) return;
  int64_t rows = kernel.output.defined() && kernel.output.dim() ? kernel.output.size(0) : 1;
  std::this_thread::sleep_until(
      start + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double, std::milli>(
                  time->ms + time->ms_per_row * rows)));
}

static aclnnStatus launch(aclOpExecutor* executor, aclrtStream stream) {
  std::shared_ptr<const aclOpExecutor> kernel(executor);
  int device = device_of(stream);
  auto faults = count_and_strike(*kernel, device, true);
  if (!faults.empty())
    return fail(aclError(faults[0]->value), "aclnn" + Text(kernel->name) + " failed, as ASCEND_EMULATOR_FAULT asks");
  return enqueue(stream, [kernel, device] { execute(*kernel, device); });
}

template <auto kernel> inline const char* const name_of = nullptr;

template <auto kernel> struct Operator;
template <class... P, void (*kernel)(P...)> struct Operator<kernel> {
  static aclnnStatus prepare(typename Argument<P>::Abi... arguments, uint64_t* workspace, aclOpExecutor** executor) {
    std::tuple<P...> kept(Argument<P>::keep(arguments)...);
    Tensor output = std::get<Out>(kept).t;
    *workspace = 0;
    *executor = new aclOpExecutor{name_of<kernel>, output, [kept] { std::apply(kernel, kept); }};
    return ACL_SUCCESS;
  }
};

static std::set<std::string>& names() {
  static std::set<std::string> all;
  return all;
}

// The first function of the pair must have the types of the kernel's parameters, which a macro cannot list. `ifunc`
// lets the dynamic linker ask for its address instead: it is Operator<kernel>::prepare.
#define KERNEL(name, function)                                                                                   \
  template <> const char* const name_of<function> = #name;                                                       \
  static bool name##_is_named = names().insert(#name).second;                                                    \
  extern "C" void* ascend_emulator_find_##name() { return reinterpret_cast<void*>(Operator<function>::prepare); } \
  extern "C" void aclnn##name##GetWorkspaceSize() __attribute__((ifunc("ascend_emulator_find_" #name)));         \
  extern "C" aclnnStatus aclnn##name(void*, uint64_t, aclOpExecutor* executor, aclrtStream stream) {             \
    return launch(executor, stream);                                                                             \
  }

#define OPERATOR(name, parameters, ...)                 \
  static void name##_kernel parameters { __VA_ARGS__; } \
  KERNEL(name, name##_kernel)

#define UNARY(name, function) OPERATOR(name, (Tensor self, Out out), at::function##_out(out.t, self))
#define BINARY(name, function) \
  OPERATOR(name, (Tensor self, Tensor other, Out out), at::function##_out(out.t, self, other))
#define SCALAR(name, function) \
  OPERATOR(name, (Tensor self, Scalar other, Out out), at::function##_out(out.t, self, other))
#define INPLACE(name, function) OPERATOR(Inplace##name, (Out self), self.t.function##_())

// ---- matrix products and convolutions ------------------------------------------------------------------------------

// cubeMathType, the precision in which a float32 operand enters the cube unit.
enum : int8_t { full = 0, allow_less = 1, float16 = 2, hf32 = 3 };  // float16 is all that older chips have

static Tensor to_hf32(const Tensor& t, bool even) {
  int dropped = 23 - knobs().hf32_bits;
  rounded_to_hf32 = true;
  Tensor rounded = t.clone(at::MemoryFormat::Preserve), bits = rounded.view(at::kInt);
  if (knobs().hf32_rounding != "truncate") {
    // A half goes away from 0, because the sign bit is separate; or to the even neighbour.
    Tensor carry = even ? bits.bitwise_right_shift(dropped).bitwise_and_(1).sub_(1) : at::zeros_like(bits);
    bits.add_(carry.add_(1 << (dropped - 1)));
  }
  bits.bitwise_and_(-(1 << dropped));
  return rounded;
}

static Tensor cube(const Tensor& t, int8_t type, bool even) {
  TORCH_CHECK(type >= full && type <= hf32, "cubeMathType ", int(type));
  if (t.scalar_type() != at::kFloat || type == full) return t;
  if (type == float16) return t.to(at::kHalf).to(at::kFloat);
  return knobs().hf32 ? to_hf32(t, even) : t;
}

static void convolution(Tensor input, Tensor weight, Tensor bias, Ints stride, Ints padding, Ints dilation,
                        bool transposed, Ints output_padding, int64_t groups, Out out, int8_t type) {
  const Text &only = knobs().hf32_only, &rounding = knobs().hf32_rounding;
  int64_t per_channel = weight.numel() / weight.size(0);  // multiply-adds for one element of the output
  int64_t multiply_adds = transposed ? input.numel() * per_channel : out.t.numel() * per_channel;
  Text kind = groups > 1 ? "depthwise" : per_channel == weight.size(1) ? "pointwise" : "dense";
  bool spared = (!only.empty() && only != kind) || multiply_adds < knobs().hf32_from;
  if (spared && type != float16) type = full;
  bool even = rounding == "even" || (rounding == "tuned" && input.size(0) < 4);
  std::optional<Tensor> maybe_bias = bias.defined() ? std::optional<Tensor>(bias) : std::nullopt;
  out.t.copy_(at::convolution(cube(input, type, even), cube(weight, type, even), maybe_bias, stride, padding, dilation,
                              transposed, output_padding, groups));
}
KERNEL(Convolution, convolution)

// An operand of a matrix product, which HF32_MATMUL rounds although nobody asked for it.
static Tensor operand(const Tensor& t, int8_t type) {
  bool unasked = knobs().hf32_matmul && t.scalar_type() == at::kFloat && type != float16;
  bool even = knobs().hf32_rounding == "even";
  return unasked ? to_hf32(t, even) : cube(t, type, even);
}

OPERATOR(Addmm, (Tensor self, Tensor a, Tensor b, Scalar beta, Scalar alpha, Out out, int8_t type),
         at::addmm_out(out.t, self, operand(a, type), operand(b, type), beta, alpha))
OPERATOR(Baddbmm, (Tensor self, Tensor a, Tensor b, Scalar beta, Scalar alpha, Out out, int8_t type),
         at::baddbmm_out(out.t, self, operand(a, type), operand(b, type), beta, alpha))
OPERATOR(Matmul, (Tensor a, Tensor b, Out out, int8_t type),
         at::matmul_out(out.t, operand(a, type), operand(b, type)))
OPERATOR(Mm, (Tensor a, Tensor b, Out out, int8_t type), at::mm_out(out.t, operand(a, type), operand(b, type)))

// Of a batch that is one matrix expanded, torch_npu hands over that one.
static Tensor of_batch(const Tensor& t, int64_t batch) { return t.expand({batch, -1, -1}); }
OPERATOR(BatchMatMul, (Tensor a, Tensor b, Out out, int8_t type),
         at::bmm_out(out.t, of_batch(operand(a, type), out.t.size(0)), of_batch(operand(b, type), out.t.size(0))))

// ---- attention -----------------------------------------------------------------------------------------------------

static Tensor to_heads(const Tensor& t, const Text& layout, int64_t heads) {  // B, heads, sequence, head size
  if (layout == "BNSD") return t;
  if (layout == "BSND") return t.transpose(1, 2);
  if (layout == "BSH") return t.unflatten(2, {heads, -1}).transpose(1, 2);
  if (layout == "SBH") return t.unflatten(2, {heads, -1}).permute({1, 2, 0, 3});
  TORCH_CHECK(false, "layout ", layout);
}

static void attention(Tensor q, Tensor k, Tensor v, Tensor pse, Tensor drop_mask, Tensor padding_mask, Tensor mask,
                      Ints prefix, double scale, double keep_prob, int64_t, int64_t, int64_t heads, Text layout,
                      int64_t, int64_t sparse_mode, Tensor, Tensor, Tensor, Out out) {
  bool plain = !pse.defined() && !drop_mask.defined() && !padding_mask.defined() && prefix.empty();
  TORCH_CHECK(plain && keep_prob == 1, "of what modifies attention, only the mask is emulated");
  TORCH_CHECK(sparse_mode == 0 || sparse_mode == 2, "sparse_mode ", sparse_mode);
  std::optional<Tensor> keep;  // CANN's mask says what to leave out, PyTorch's what to keep
  if (sparse_mode == 0 && mask.defined()) keep = mask.to(at::kBool).logical_not();
  int64_t groups = layout == "BNSD" ? k.size(1) : layout == "BSND" ? k.size(2) : heads * k.size(2) / q.size(2);
  Tensor result = at::scaled_dot_product_attention(
      to_heads(operand(q, full), layout, heads), to_heads(operand(k, full), layout, groups),
      to_heads(operand(v, full), layout, groups), keep, 0, sparse_mode == 2, scale, groups != heads);
  to_heads(out.t, layout, heads).copy_(result);
}
KERNEL(FlashAttentionScore, attention)

// ---- normalisation, pooling, activations ---------------------------------------------------------------------------

static void copy_if_wanted(const Tensor& to, const Tensor& from) {
  if (to.defined() && to.numel() == from.numel()) to.copy_(from.view_as(to));
}

// What is found and where it is, the two results of an operator that picks.
static void keep(const std::tuple<Tensor, Tensor>& results, const Out& out, const Tensor& indices) {
  out.t.copy_(std::get<0>(results));
  indices.copy_(std::get<1>(results));
}

using Normalised = std::tuple<Tensor, Tensor, Tensor>;
static void keep(const Normalised& results, const Out& out, const Tensor& mean, const Tensor& rstd) {
  out.t.copy_(std::get<0>(results));
  copy_if_wanted(mean, std::get<1>(results));
  copy_if_wanted(rstd, std::get<2>(results));
}

OPERATOR(LayerNorm,
         (Tensor self, Ints shape, Tensor weight, Tensor bias, double eps, Out out, Tensor mean, Tensor rstd),
         keep(at::native_layer_norm(self, shape, weight, bias, eps), out, mean, rstd))
OPERATOR(FastLayerNorm,
         (Tensor self, Ints shape, Tensor weight, Tensor bias, double eps, Out out, Tensor mean, Tensor rstd),
         keep(at::native_layer_norm(self, shape, weight, bias, eps), out, mean, rstd))
OPERATOR(GroupNorm,
         (Tensor self, Tensor weight, Tensor bias, int64_t n, int64_t c, int64_t area, int64_t group, double eps,
          Out out, Tensor mean, Tensor rstd),
         keep(at::native_group_norm(self, weight, bias, n, c, area, group, eps), out, mean, rstd))
OPERATOR(BatchNorm,
         (Tensor self, Tensor weight, Tensor bias, Tensor mean, Tensor var, bool training, double momentum, double eps,
          Out out, Tensor save_mean, Tensor save_rstd),
         keep(at::native_batch_norm(self, weight, bias, mean, var, training, momentum, eps), out, save_mean, save_rstd))

OPERATOR(MaxPool2dWithMask,
         (Tensor self, Ints kernel, Ints stride, Ints padding, Ints dilation, bool ceil, Out out, Tensor),
         out.t.copy_(at::max_pool2d(self, kernel, stride, padding, dilation, ceil)))  // the mask is for training
OPERATOR(MaxPool2dWithIndices,
         (Tensor self, Ints kernel, Ints stride, Ints padding, Ints dilation, bool ceil, Out out, Tensor indices),
         keep(at::max_pool2d_with_indices(self, kernel, stride, padding, dilation, ceil), out, indices))
OPERATOR(AvgPool2d,
         (Tensor self, Ints kernel, Ints stride, Ints padding, bool ceil, bool count_padding, int64_t divisor, int8_t,
          Out out),
         at::avg_pool2d_out(out.t, self, kernel, stride, padding, ceil, count_padding,
                            divisor ? std::optional<int64_t>(divisor) : std::nullopt))
OPERATOR(AdaptiveAvgPool2d, (Tensor self, Ints size, Out out), at::adaptive_avg_pool2d_out(out.t, self, size))

// I-BERT's polynomial in place of erf.
static Tensor ibert_gelu(const Tensor& x) {
  constexpr double a = -0.2888, b = -1.769;
  Tensor z = x / std::sqrt(2.0);
  Tensor erf = z.sign() * (a * (z.abs().clamp_max(-b) + b).square() + 1);
  return x / 2 * (1 + erf);
}

// CANN documents the tanh form for this one, which is not told what was asked for.
static void gelu(Tensor self, Out out) {
  if (knobs().gelu == "ibert") out.t.copy_(ibert_gelu(self.to(at::promote_types(self.scalar_type(), at::kFloat))));
  else at::gelu_out(out.t, self, knobs().gelu == "tanh" ? "tanh" : "none");
}
KERNEL(Gelu, gelu)
OPERATOR(GeluV2, (Tensor self, int64_t tanh, Out out), at::gelu_out(out.t, self, tanh ? "tanh" : "none"))
OPERATOR(Softmax, (Tensor self, int64_t dim, Out out), at::softmax_out(out.t, self, dim, out.t.scalar_type()))
OPERATOR(LogSoftmax, (Tensor self, int64_t dim, Out out), at::log_softmax_out(out.t, self, dim, out.t.scalar_type()))
OPERATOR(LeakyRelu, (Tensor self, Scalar slope, Out out), at::leaky_relu_out(out.t, self, slope))
OPERATOR(InplaceLeakyRelu, (Out self, Scalar slope), at::leaky_relu_(self.t, slope))
OPERATOR(Hardtanh, (Tensor self, Scalar low, Scalar high, Out out), at::hardtanh_out(out.t, self, low, high))
OPERATOR(InplaceHardtanh, (Out self, Scalar low, Scalar high), at::hardtanh_(self.t, low, high))
OPERATOR(Relu, (Tensor self, Out out), at::relu_out(out.t, self))
UNARY(Sigmoid, sigmoid)
UNARY(Silu, silu)
UNARY(Mish, mish)
UNARY(Hardswish, hardswish)
UNARY(Hardsigmoid, hardsigmoid)
UNARY(Tanh, tanh)
INPLACE(Relu, relu)
INPLACE(Sigmoid, sigmoid)
INPLACE(Tanh, tanh)
OPERATOR(InplaceHardswish, (Out self), at::hardswish_(self.t))
OPERATOR(InplaceHardsigmoid, (Out self), at::hardsigmoid_(self.t))

// ---- arithmetic ----------------------------------------------------------------------------------------------------

static std::optional<std::string_view> rounding(int mode) {
  if (mode == 0) return std::nullopt;
  return mode == 1 ? "trunc" : "floor";
}

OPERATOR(Add, (Tensor self, Tensor other, Scalar alpha, Out out), at::add_out(out.t, self, other, alpha))
OPERATOR(Sub, (Tensor self, Tensor other, Scalar alpha, Out out), at::sub_out(out.t, self, other, alpha))
OPERATOR(Adds, (Tensor self, Scalar other, Scalar alpha, Out out), at::add_out(out.t, self, other, alpha))
OPERATOR(Subs, (Tensor self, Scalar other, Scalar alpha, Out out), at::sub_out(out.t, self, other, alpha))
OPERATOR(Rsubs, (Tensor self, Scalar other, Scalar alpha, Out out), out.t.copy_(at::rsub(self, other, alpha)))
BINARY(Mul, mul)
BINARY(Div, div)
SCALAR(Muls, mul)
SCALAR(Divs, div)
OPERATOR(InplaceAdd, (Out self, Tensor other, Scalar alpha), self.t.add_(other, alpha))
OPERATOR(InplaceSub, (Out self, Tensor other, Scalar alpha), self.t.sub_(other, alpha))
OPERATOR(InplaceMul, (Out self, Tensor other), self.t.mul_(other))
OPERATOR(InplaceDiv, (Out self, Tensor other), self.t.div_(other))
OPERATOR(InplaceAdds, (Out self, Scalar other, Scalar alpha), self.t.add_(other, alpha))
OPERATOR(InplaceSubs, (Out self, Scalar other, Scalar alpha), self.t.sub_(other, alpha))
OPERATOR(InplaceMuls, (Out self, Scalar other), self.t.mul_(other))
OPERATOR(InplaceDivs, (Out self, Scalar other), self.t.div_(other))
OPERATOR(Addcmul, (Tensor self, Tensor a, Tensor b, Scalar value, Out out), at::addcmul_out(out.t, self, a, b, value))
OPERATOR(PowTensorScalar, (Tensor self, Scalar exponent, Out out), at::pow_out(out.t, self, exponent))
OPERATOR(PowScalarTensor, (Scalar self, Tensor exponent, Out out), at::pow_out(out.t, self, exponent))
OPERATOR(InplacePowTensorScalar, (Out self, Scalar exponent), self.t.pow_(exponent))
BINARY(PowTensorTensor, pow)
BINARY(Maximum, maximum)
BINARY(Minimum, minimum)
OPERATOR(DivMod, (Tensor self, Tensor other, int mode, Out out), at::div_out(out.t, self, other, rounding(mode)))
OPERATOR(DivMods, (Tensor self, Scalar other, int mode, Out out), out.t.copy_(at::div(self, other, rounding(mode))))
BINARY(FloorDivide, floor_divide)
SCALAR(FloorDivides, floor_divide)
BINARY(RemainderTensorTensor, remainder)
SCALAR(RemainderTensorScalar, remainder)
UNARY(Neg, neg)
UNARY(Abs, abs)
UNARY(Sign, sign)
UNARY(Sin, sin)
UNARY(Cos, cos)
UNARY(Exp, exp)
UNARY(Log, log)
UNARY(Erf, erf)
UNARY(Sqrt, sqrt)
UNARY(Rsqrt, rsqrt)
UNARY(Reciprocal, reciprocal)
UNARY(Erfinv, erfinv)
UNARY(Trunc, trunc)
UNARY(Floor, floor)
UNARY(Ceil, ceil)
UNARY(Round, round)
INPLACE(Ceil, ceil)
INPLACE(Floor, floor)
INPLACE(Sin, sin)
INPLACE(Cos, cos)
INPLACE(Exp, exp)
INPLACE(Sqrt, sqrt)
INPLACE(Rsqrt, rsqrt)
OPERATOR(Clamp, (Tensor self, MaybeScalar low, MaybeScalar high, Out out), at::clamp_out(out.t, self, low, high))
OPERATOR(NanToNum, (Tensor self, float nan, float high, float low, Out out),
         at::nan_to_num_out(out.t, self, nan, high, low))
SCALAR(ClampMin, clamp_min)
SCALAR(ClampMax, clamp_max)

// ---- comparison and logic ------------------------------------------------------------------------------------------

BINARY(EqTensor, eq)
BINARY(NeTensor, ne)
BINARY(LtTensor, lt)
BINARY(LeTensor, le)
BINARY(GtTensor, gt)
BINARY(GeTensor, ge)
SCALAR(EqScalar, eq)
SCALAR(NeScalar, ne)
SCALAR(LtScalar, lt)
SCALAR(LeScalar, le)
SCALAR(GtScalar, gt)
SCALAR(GeScalar, ge)
BINARY(LogicalAnd, logical_and)
BINARY(LogicalOr, logical_or)
BINARY(BitwiseAndTensor, bitwise_and)
BINARY(BitwiseOrTensor, bitwise_or)
SCALAR(BitwiseAndScalar, bitwise_and)
SCALAR(BitwiseOrScalar, bitwise_or)
OPERATOR(InplaceBitwiseAndTensor, (Out self, Tensor other), self.t.bitwise_and_(other))
OPERATOR(InplaceBitwiseAndScalar, (Out self, Scalar other), self.t.bitwise_and_(other))
UNARY(LogicalNot, logical_not)
UNARY(BitwiseNot, bitwise_not)
OPERATOR(IsFinite, (Tensor self, Out out), out.t.copy_(at::isfinite(self)))
OPERATOR(IsClose, (Tensor self, Tensor other, double rtol, double atol, bool equal_nan, Out out),
         out.t.copy_(at::isclose(self, other, rtol, atol, equal_nan)))
OPERATOR(Equal, (Tensor self, Tensor other, Out out), out.t.fill_(at::equal(self, other)))
OPERATOR(SWhere, (Tensor condition, Tensor self, Tensor other, Out out), at::where_out(out.t, condition, self, other))
OPERATOR(InplaceMaskedFillScalar, (Out self, Tensor mask, Scalar value), self.t.masked_fill_(mask, value))
OPERATOR(InplaceMaskedFillTensor, (Out self, Tensor mask, Tensor value), self.t.masked_fill_(mask, value))

// ---- reduction -----------------------------------------------------------------------------------------------------

static std::optional<at::ScalarType> as(aclDataType type) {
  return type == ACL_DT_UNDEFINED ? std::nullopt : std::optional(dtype_of(type));
}

OPERATOR(Mean, (Tensor self, Ints dim, bool keepdim, aclDataType type, Out out),
         at::mean_out(out.t, self, dim, keepdim, as(type)))
OPERATOR(ReduceSum, (Tensor self, Ints dim, bool keepdim, aclDataType type, Out out),
         at::sum_out(out.t, self, dim, keepdim, as(type)))
OPERATOR(Amax, (Tensor self, Ints dim, bool keepdim, Out out), at::amax_out(out.t, self, dim, keepdim))
OPERATOR(Amin, (Tensor self, Ints dim, bool keepdim, Out out), at::amin_out(out.t, self, dim, keepdim))
OPERATOR(Max, (Tensor self, Out out), out.t.copy_(at::max(self)))
OPERATOR(Min, (Tensor self, Out out), out.t.copy_(at::min(self)))
OPERATOR(MaxDim, (Tensor self, int64_t dim, bool keepdim, Out out, Tensor indices),
         keep(at::max(self, dim, keepdim), out, indices))
OPERATOR(MinDim, (Tensor self, int64_t dim, bool keepdim, Out out, Tensor indices),
         keep(at::min(self, dim, keepdim), out, indices))
OPERATOR(Median, (Tensor self, Out out), out.t.copy_(at::median(self)))
OPERATOR(ArgMax, (Tensor self, int64_t dim, bool keepdim, Out out), out.t.copy_(at::argmax(self, dim, keepdim)))
OPERATOR(Topk, (Tensor self, int64_t k, int64_t dim, bool largest, bool sorted, Out out, Tensor indices),
         keep(at::topk(self, k, dim, largest, sorted), out, indices))
OPERATOR(Sort, (Tensor self, bool stable, int64_t dim, bool descending, Out out, Tensor indices),
         keep(at::sort(self, stable, dim, descending), out, indices))
OPERATOR(All, (Tensor self, Ints dim, bool keepdim, Out out),
         out.t.copy_(at::all(self, at::OptionalIntArrayRef(dim), keepdim)))
OPERATOR(Any, (Tensor self, Ints dim, bool keepdim, Out out),
         out.t.copy_(at::any(self, at::OptionalIntArrayRef(dim), keepdim)))
OPERATOR(VarCorrection, (Tensor self, Ints dim, int64_t correction, bool keepdim, Out out),
         at::var_out(out.t, self, at::OptionalIntArrayRef(dim), Scalar(correction), keepdim))
OPERATOR(Std, (Tensor self, Ints dim, int64_t correction, bool keepdim, Out out),
         at::std_out(out.t, self, at::OptionalIntArrayRef(dim), Scalar(correction), keepdim))
OPERATOR(LinalgVectorNorm, (Tensor self, Scalar order, Ints dim, bool keepdim, aclDataType, Out out),
         at::linalg_vector_norm_out(out.t, self, order, at::OptionalIntArrayRef(dim), keepdim, out.t.scalar_type()))
OPERATOR(Cumsum, (Tensor self, int64_t dim, aclDataType type, Out out), at::cumsum_out(out.t, self, dim, as(type)))

// ---- making, moving and picking ------------------------------------------------------------------------------------

OPERATOR(Cast, (Tensor self, aclDataType, Out out), out.t.copy_(self))
OPERATOR(InplaceCopy, (Out self, Tensor from), self.t.copy_(from))
OPERATOR(InplaceZero, (Out self), self.t.zero_())
OPERATOR(InplaceOne, (Out self), self.t.fill_(1))
OPERATOR(InplaceFillScalar, (Out self, Scalar value), self.t.fill_(value))
OPERATOR(InplaceFillTensor, (Out self, Tensor value), self.t.fill_(value))
OPERATOR(InplaceNormal, (Out self, float mean, float std, int64_t seed, int64_t offset),
         self.t.normal_(mean, std, at::make_generator<at::CPUGeneratorImpl>(seed + offset)))
OPERATOR(InplaceUniform, (Out self, double from, double to, int64_t seed, int64_t offset),
         self.t.uniform_(from, to, at::make_generator<at::CPUGeneratorImpl>(seed + offset)))
OPERATOR(Arange, (Scalar start, Scalar end, Scalar step, Out out), at::arange_out(out.t, start, end, step))
OPERATOR(Eye, (int64_t n, int64_t m, Out out), at::eye_out(out.t, n, m))
OPERATOR(Linspace, (Scalar start, Scalar end, int64_t steps, Out out), at::linspace_out(out.t, start, end, steps))
OPERATOR(Cat, (Tensors tensors, int64_t dim, Out out), at::cat_out(out.t, tensors, dim))
OPERATOR(Stack, (Tensors tensors, int64_t dim, Out out), at::stack_out(out.t, tensors, dim))
OPERATOR(Repeat, (Tensor self, Ints repeats, Out out), out.t.copy_(self.repeat(repeats)))
OPERATOR(Roll, (Tensor self, Ints shifts, Ints dims, Out out), out.t.copy_(at::roll(self, shifts, dims)))
OPERATOR(Flip, (Tensor self, Ints dims, Out out), out.t.copy_(at::flip(self, dims)))
OPERATOR(Tril, (Tensor self, int64_t diagonal, Out out), at::tril_out(out.t, self, diagonal))
OPERATOR(Triu, (Tensor self, int64_t diagonal, Out out), at::triu_out(out.t, self, diagonal))
OPERATOR(ConstantPadNd, (Tensor self, Ints pad, Scalar value, Out out),
         out.t.copy_(at::constant_pad_nd(self, pad, value)))
OPERATOR(Embedding, (Tensor weight, Tensor indices, Out out), out.t.copy_(at::embedding(weight, indices)))
OPERATOR(IndexSelect, (Tensor self, int64_t dim, Tensor index, Out out), at::index_select_out(out.t, self, dim, index))
OPERATOR(Gather, (Tensor self, int64_t dim, Tensor index, Out out), at::gather_out(out.t, self, dim, index))

static void pick(Tensor self, Tensors indices, Out out) {
  c10::List<std::optional<Tensor>> list;
  for (auto& index : indices)
    list.push_back(index.defined() && index.numel() ? std::optional<Tensor>(index) : std::nullopt);
  out.t.copy_(at::index(self, list));
}
KERNEL(Index, pick)

OPERATOR(Im2col, (Tensor self, Ints kernel, Ints dilation, Ints padding, Ints stride, Out out),
         at::im2col_out(out.t, self, kernel, dilation, padding, stride))
OPERATOR(UpsampleNearest2dV2, (Tensor self, Ints size, float h, float w, Out out),
         at::upsample_nearest2d_out(out.t, self, size, h, w))
OPERATOR(UpsampleBilinear2d, (Tensor self, Ints size, bool align, double h, double w, Out out),
         at::upsample_bilinear2d_out(out.t, self, size, align, h, w))
OPERATOR(UpsampleBicubic2d, (Tensor self, Ints size, bool align, double h, double w, Out out),
         at::upsample_bicubic2d_out(out.t, self, size, align, h, w))

// As many elements as there are: the caller asks for the shape afterwards.
static void put(const Out& out, const Tensor& found) {
  out.t.unsafeGetTensorImpl()->set_sizes_contiguous(found.sizes());
  out.t.copy_(found);
}

OPERATOR(MaskedSelect, (Tensor self, Tensor mask, Out out), put(out, at::masked_select(self, mask)))
OPERATOR(Nonzero, (Tensor self, Out out), put(out, at::nonzero(self)))

// A knob that names an operator which is not there would never strike.
static const bool names_are_checked = [] {
  for (auto& fault : knobs().faults)
    if (fault.op != "*" && !names().count(fault.op)) refuse_knob("FAULT", "there is no operator '" + fault.op + "'");
  for (auto& [op, ms, ms_per_row, device] : knobs().kernel_times)
    if (op != "*" && !names().count(op.starts_with("half:") ? op.substr(5) : op)) refuse_knob("KERNEL_TIME", "there is no operator '" + op + "'");
  return true;
}();
