//! Runs a TorchScript file that Python exported, without Python, and compares the logits bit for bit.
//!
//! ```sh
//! cargo run --release --example load_torchscript -- model.pt samples.safetensors
//! ```
//!
//! `samples.safetensors` holds `input` and the `logits` that Python computed for it. The exit status is
//! 1 if a single bit differs.

use std::process::ExitCode;
use tch::{CModule, Kind, Tensor};

fn run(model: &str, samples: &str) -> Result<bool, Box<dyn std::error::Error>> {
    // The model's rimet ops are in this program.
    println!("rimet {} ops registered", rimet::register_ops());
    // As many threads as the samples were made with give the same order of additions.
    if let Some(threads) = std::env::var("OMP_NUM_THREADS")
        .ok()
        .and_then(|n| n.parse().ok())
    {
        tch::set_num_threads(threads);
    }
    let tensors = Tensor::read_safetensors(samples)?;
    let named = |name: &str| {
        tensors
            .iter()
            .find(|(n, _)| n == name)
            .map(|(_, t)| t)
            .ok_or_else(|| format!("{samples}: no tensor named {name:?}"))
    };
    let (input, expected) = (named("input")?, named("logits")?);
    let model = CModule::load(model)?;
    let logits = tch::no_grad(|| model.forward_ts(&[input]))?;
    if logits.size() != expected.size() {
        return Err(format!(
            "logits: expected shape {:?}, got {:?}",
            expected.size(),
            logits.size()
        )
        .into());
    }
    let different = logits
        .view_dtype(Kind::Int)
        .ne_tensor(&expected.view_dtype(Kind::Int))
        .to_kind(Kind::Int64)
        .sum(Kind::Int64)
        .int64_value(&[]);
    let largest = (&logits - expected).abs().max().double_value(&[]);
    if different == 0 {
        println!(
            "{} logits of {} inputs: equal to Python's, bit for bit",
            logits.numel(),
            input.size()[0]
        );
    } else {
        println!(
            "{different} of {} logits differ, by {largest:e} at most",
            logits.numel()
        );
    }
    Ok(different == 0)
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, samples] = arguments.as_slice() else {
        eprintln!("usage: load_torchscript MODEL.pt SAMPLES.safetensors");
        return ExitCode::from(2);
    };
    match run(model, samples) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(2)
        }
    }
}
