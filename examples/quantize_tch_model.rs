//! Quantizes a small model written with tch: train in float, calibrate, compare, fine-tune.
//!
//! ```sh
//! cargo run --release --example quantize_tch_model
//! ```
//!
//! The task: tell apart three kinds of noisy 8x8 pictures (horizontal, vertical, diagonal stripes).

use rimet::nn::{Conv2D, Linear};
use tch::nn::{self, Module, OptimizerConfig};
use tch::{Device, Kind, Tensor};

const CLASSES: i64 = 3;

/// Pictures [n, 1, 8, 8] and their classes.
fn stripes(n: i64) -> (Tensor, Tensor) {
    let options = (Kind::Float, Device::Cpu);
    let labels = Tensor::randint(CLASSES, [n], (Kind::Int64, Device::Cpu));
    let phase = Tensor::rand([n, 1, 1], options) * 6.0;
    let row = Tensor::arange(8, options).reshape([1, 8, 1]);
    let column = Tensor::arange(8, options).reshape([1, 1, 8]);
    let of_class = |k: i64| labels.eq(k).to_kind(Kind::Float).reshape([n, 1, 1]);
    let angle = &row * (of_class(0) + of_class(2)) + &column * (of_class(1) + of_class(2));
    let picture = (angle * 1.6 + phase).sin() + Tensor::randn([n, 8, 8], options) * 0.8;
    (picture.unsqueeze(1), labels)
}

fn accuracy(logits: &Tensor, labels: &Tensor) -> f64 {
    let right = logits.argmax(-1, false).eq_tensor(labels);
    100.0
        * right
            .to_kind(Kind::Float)
            .mean(Kind::Float)
            .double_value(&[])
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    tch::manual_seed(0);
    let store = nn::VarStore::new(Device::Cpu);
    let root = store.root();
    let config = nn::ConvConfig {
        padding: 1,
        stride: 2,
        ..Default::default()
    };
    let conv = nn::conv2d(&root / "conv", 1, 8, 3, config);
    let fc = nn::linear(&root / "fc", 8 * 16, CLASSES, Default::default());
    let (train, train_labels) = stripes(2000);
    let (test, test_labels) = stripes(1000);

    let float = |x: &Tensor| fc.forward(&conv.forward(x).relu().flatten(1, -1));
    let mut optimizer = nn::Adam::default().build(&store, 5e-3)?;
    for _ in 0..60 {
        optimizer.backward_step(&float(&train).cross_entropy_for_logits(&train_labels));
    }
    let float_accuracy = accuracy(&float(&test), &test_labels);
    println!("float32      {float_accuracy:5.1} %");

    // 2-bit weights, 4-bit activations; one line a layer.
    let mut conv = Conv2D::new(&(&root / "conv"), (conv, config), 2, 4)?;
    let mut fc = Linear::new(&(&root / "fc"), fc, 2, 8)?;
    let hidden = conv.observe(&train)?;
    conv.calibrate()?;
    let _ = fc.observe(&hidden.relu().flatten(1, -1))?;
    fc.calibrate()?;
    let quantized = |x: &Tensor| fc.forward(&conv.forward(x).relu().flatten(1, -1));
    println!(
        "W2A4 nearest {:5.1} %",
        accuracy(&quantized(&test), &test_labels)
    );

    // Weights and ranges learn together: the ranges are variables of the store.
    let mut optimizer = nn::Adam::default().build(&store, 2e-3)?;
    for _ in 0..60 {
        optimizer.backward_step(&quantized(&train).cross_entropy_for_logits(&train_labels));
    }
    let trained_accuracy = accuracy(&quantized(&test), &test_labels);
    println!("W2A4 trained {trained_accuracy:5.1} %");
    if trained_accuracy < float_accuracy - 3.0 {
        return Err("training did not bring back the accuracy".into());
    }
    Ok(())
}
