//! Compiles `csrc/` against the torch that torch-sys found, and says which C++ belongs to the crate.

use std::path::PathBuf;
use std::process::Command;

const SOURCES: [&str; 12] = [
    "schemas.cpp",
    "adaround.cpp",
    "affine.cpp",
    "affine_autograd.cpp",
    "affine_tensor_ops.cpp",
    "cuda.cpp",
    "float.cpp",
    "grouped_block.cpp",
    "memory.cpp",
    "min_max.cpp",
    "rust_api.cpp",
    "seq_mse.cpp",
];

fn main() {
    println!("cargo:rerun-if-changed=csrc");
    println!("cargo:rerun-if-env-changed=LIBTORCH_USE_PYTORCH");
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    println!("cargo:rerun-if-env-changed=VIRTUAL_ENV");

    // torch-sys says where libtorch's libraries are; the headers lie beside them.
    let lib = PathBuf::from(
        std::env::var("DEP_TCH_LIBTORCH_LIB")
            .expect("torch-sys gives DEP_TCH_LIBTORCH_LIB to the crates that use it"),
    );
    let include = lib
        .parent()
        .expect("libtorch/lib has a parent")
        .join("include");
    let abi = if std::env::var_os("LIBTORCH_USE_PYTORCH").is_some() {
        let python = if std::env::var_os("VIRTUAL_ENV").is_some() {
            "python"
        } else {
            "python3"
        };
        let output = Command::new(python)
            .args([
                "-c",
                "import torch; print(int(torch._C._GLIBCXX_USE_CXX11_ABI))",
            ])
            .output()
            .expect("python with torch can be run: torch-sys has just done so");
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    } else {
        std::env::var("LIBTORCH_CXX11_ABI").unwrap_or_else(|_| "1".to_owned())
    };

    let version = std::env::var("CARGO_PKG_VERSION").expect("cargo sets it");
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .pic(true)
        .opt_level(2)
        .debug(false)
        .warnings(false)
        // torch's headers are not ours to warn about.
        .flag(format!("-isystem{}", include.display()))
        .flag(format!(
            "-isystem{}",
            include.join("torch/csrc/api/include").display()
        ))
        .flag("-Wall")
        .flag("-fvisibility=hidden")
        .define("_GLIBCXX_USE_CXX11_ABI", abi.as_str())
        .define("RIMET_VERSION", format!("\"{version}\"").as_str())
        .files(SOURCES.iter().map(|s| PathBuf::from("csrc").join(s)))
        .compile("rimet_csrc");
}
