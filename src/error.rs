//! The crate's one error type. Each variant names the argument, what was expected and what came.

use std::fmt;

/// What a caller did wrong, or what went wrong underneath.
///
/// `Value`, `Type` and `State` become `ValueError`, `TypeError` and `RuntimeError` in Python, and the
/// corresponding `c10` exceptions when they cross `torch.ops.rimet`.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An argument has the right type but a value outside what is allowed.
    #[error("{argument}: expected {expected}, got {got}")]
    Value {
        argument: String,
        expected: String,
        got: String,
    },
    /// An argument is of a wrong kind (dtype, layout, device).
    #[error("{argument}: expected {expected}, got {got}")]
    Type {
        argument: String,
        expected: String,
        got: String,
    },
    /// The object is not in a state that allows the operation (for example, not calibrated).
    #[error("{0}")]
    State(String),
    /// An error raised by LibTorch.
    #[error("torch: {0}")]
    Torch(#[from] tch::TchError),
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    Io {
        path: String,
        source: std::io::Error,
    },
    /// JSON that does not parse, or does not say what its format asks for. `at` is the JSON path.
    #[error("{at}: {message}")]
    Json { at: String, message: String },
}

/// The crate's result type.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// A wrong value of an argument.
    pub fn value(
        argument: impl Into<String>,
        expected: impl fmt::Display,
        got: impl fmt::Display,
    ) -> Self {
        Error::Value {
            argument: argument.into(),
            expected: expected.to_string(),
            got: got.to_string(),
        }
    }

    /// A wrong kind of argument.
    pub fn type_(
        argument: impl Into<String>,
        expected: impl fmt::Display,
        got: impl fmt::Display,
    ) -> Self {
        Error::Type {
            argument: argument.into(),
            expected: expected.to_string(),
            got: got.to_string(),
        }
    }
}
