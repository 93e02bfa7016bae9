"""Classes of kernels, by names and paths from traces of a CPU and of an H200."""

import pytest
import torch

from vitnb import variants
from vitnb.analysis import kernel_classes
from vitnb.measure import profiler
from vitnb.models import loader

# Kernels seen on an H200 (torch 2.11, bitsandbytes 0.50, flash-attn 2.8, cuDNN 9),
# shortened after the arguments.
ON_A_GPU = {
    "gemm": (
        "nvjet_sm90_tst_64x8_64x16_2x4_h_bz_bias_TNT",
        "sm80_xmma_gemm_f32f32_f32f32_f32_tn_n_tilesize32x32x8_stage3_warpsize1x2x1_"
        "ffma_aligna4_alignc4_execute_kernel__5x_cublas",
        "sm80_xmma_fprop_implicit_gemm_indexed_f32f32_f32f32_f32_nchwkcrs_nchw_"
        "tilesize32x32x8_stage3_execute_kernel__5x_cudnn",
        "void cutlass::Kernel2<cutlass_80_tensorop_i16832gemm_s8_64x64_128x6_tn_"
        "align16>(cutlass_80::Params)",
        "void gemm_4bit_sm80_m16n8k16<__nv_bfloat16, 32, 64, 128>(__nv_bfloat16 const*,"
        " unsigned char const*)",
        "void implicit_convolve_sgemm<__nv_bfloat16, __nv_bfloat16, 128, 5, 5, 3, 3, 3,"
        " 1, false, false, true>(int)",
        "std::enable_if<!(false), void>::type internal::gemvx::kernel<int, int, float, "
        "float, float, float, false>",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, float, float, float, "
        "false>(cublasLt::cublasSplitKParams<float>)",
        "void cublasLt::epilogue::impl::globalKernel<8, 32, float, float, float, true, "
        "true, 1>(int, int, long, float*)",
        "void scal_kernel<float, float, 1, true, 6, 5, 5, 3>(cublasTransposeParams<"
        "float>, float const*, float*, float const*)",
        "void sgemm_largek_lds64<true, false, 5, 5, 4, 4, 4, 34>(float*, float const*, "
        "float const*)",
    ),
    "dequantize": (
        "void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>(float*, unsigned "
        "char*, float*, __nv_bfloat16*, int, int)",
        "void kdequant_mm_int32_fp16<4, 512>(int*, float*, float*, __half*, __half*, "
        "int, int, int)",
    ),
    "quantize": (
        "void kInt8VectorQuant<__half, 1024, 1>(__half*, signed char*, float*, float, "
        "int, int)",
    ),
    "attention": (
        "void flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4, false, "
        "false, cutlass::bfloat16_t>>(flash::Flash)",
        "fmha_cutlassF_f32_aligned_64x64_rf_"
        "sm80(PyTorchMemEffAttention::AttentionKernel<float, "
        "cutlass::arch::Sm80>::Params)",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x64_"
        "4x1x1_cga1x1x1_kernel0_0",
    ),
    "normalization": (
        "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, "
        "float, false>(int, float, float const*)",
    ),
    "elementwise": (
        "void at::native::vectorized_elementwise_kernel<4, "
        "at::native::GeluCUDAKernelImpl(at::TensorIteratorBase&)>(int)",
        "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl<"
        "at::native::CUDAFunctor_add<float> >>(int)",
        "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<bool, "
        "at::native::or_kernel_cuda>>(at::native::ReduceOp)",
        "void (anonymous namespace)::softmax_warp_forward<float, float, float, 7, "
        "false, false>(float*, float const*, int)",
    ),
    "copy": (
        "Memcpy DtoH (Device -> Pinned)",
        "Memset (Device)",
        "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_"
        "cuda(at::TensorIteratorBase&)>(int)",
        "void at::native::(anonymous namespace)::CatArrayBatchedCopy<"
        "at::native::OpaqueType<2u>, unsigned int, 3, 64, 64>(int)",
    ),
    "other": ("spin_kernel(long)",),
}


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind, names in ON_A_GPU.items() for name in names],
)
def test_a_kernel_of_a_gpu_by_its_name(kind, name):
    assert kernel_classes.classify([name]) == kind


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        (["aten::addmm", "aten::linear"], "gemm"),
        (["aten::mkldnn_convolution", "aten::conv2d"], "gemm"),
        (["bitsandbytes::gemv_4bit"], "gemm"),
        (
            [
                "aten::_int_mm",
                "bitsandbytes::int8_linear_matmul",
                "bitsandbytes::int8_scaled_mm",
            ],
            "gemm",
        ),
        (
            [
                "aten::bmm",
                "aten::matmul",
                "aten::_scaled_dot_product_attention_math",
                "aten::scaled_dot_product_attention",
            ],
            "attention",
        ),
        (["aten::copy_", "aten::scaled_dot_product_attention"], "attention"),
        (
            [
                "sm80_xmma_gemm_f32f32",
                "aten::bmm",
                "aten::scaled_dot_product_attention",
            ],
            "attention",
        ),
        (
            [
                "aten::mul",
                "bitsandbytes::int8_mm_dequant",
                "bitsandbytes::int8_scaled_mm",
            ],
            "dequantize",
        ),
        (["aten::max", "bitsandbytes::int8_vectorwise_quant"], "quantize"),
        (["aten::index_select", "bitsandbytes::dequantize_4bit"], "dequantize"),
        (["aten::native_layer_norm", "aten::layer_norm"], "normalization"),
        (["aten::add_"], "elementwise"),
        (["aten::gelu"], "elementwise"),
        (["aten::_to_copy", "aten::to"], "copy"),
        (["aten::view"], "other"),
        (["aten::empty", "aten::addmm", "aten::linear"], "gemm"),
    ],
)
def test_the_outermost_wrapper_decides_then_the_nearest_known_name(path, kind):
    assert kernel_classes.classify(path) == kind


def test_every_class_and_part_is_one_of_the_named():
    assert set(ON_A_GPU) == set(kernel_classes.CLASSES)
    assert {kind for kind, _ in (*kernel_classes.WRAPPERS, *kernel_classes.NAMES)} | {
        "other"
    } == set(kernel_classes.CLASSES)


def test_the_innermost_range_is_the_part():
    assert (
        kernel_classes.model_part(["aten::addmm", "aten::linear", "vitnb::mlp"])
        == "mlp"
    )
    assert kernel_classes.model_part(["aten::add"]) == "rest"


def test_ranges_close_and_leave_no_hooks(mini):
    """Every part is entered once for each module of it, and nothing stays behind."""
    loaded = loader.load_variant(mini, variants.parse("fp32-sdpa"))
    pixels = loaded.prepare(torch.zeros(1, 3, 32, 32))
    with (
        loaded.inference() as model,
        profiler.label_parts(loaded.model),
        torch.profiler.profile() as profiled,
    ):
        model(pixel_values=pixels)
    counts = {
        event.key: event.count
        for event in profiled.key_averages()
        if event.key.startswith(kernel_classes.LABEL)
    }
    assert counts == {
        "vitnb::patch embedding": 1,
        "vitnb::attention": 3,
        "vitnb::mlp": 3,
        "vitnb::head": 1,
    }
    hooks = [
        m for m in loaded.model.modules() if m._forward_hooks or m._forward_pre_hooks
    ]
    assert not hooks
