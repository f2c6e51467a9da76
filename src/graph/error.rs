//! Errors of the graph and of the quantsim configuration. Each names where, what was expected and what came.

/// What can be wrong with a quantsim configuration file or with its application to a graph.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The text is not JSON at all.
    #[error("quantsim configuration is not valid JSON: {0}")]
    Json(String),
    /// A key or value that the format does not allow. `path` is a JSON path such as `$.op_type.Conv`.
    #[error("quantsim configuration, {path}: expected {expected}, got {got}")]
    Schema {
        path: String,
        expected: String,
        got: String,
    },
    /// Allowed by the format, but without a meaning here.
    #[error("quantsim configuration, {path}: {reason}")]
    Unsupported { path: String, reason: String },
    /// Two rules ask the same quantizer for different things.
    #[error(
        "quantsim configuration: rules contradict each other on {quantizer}: {first} and {second}"
    )]
    Conflict {
        quantizer: String,
        first: String,
        second: String,
    },
}

/// What can be wrong with a recorded graph.
#[derive(Debug, thiserror::Error)]
pub enum GraphError {
    #[error("tensor id {id} is not known to this graph ({known} tensors)")]
    UnknownTensor { id: usize, known: usize },
    #[error("module {path:?} was declared twice")]
    DuplicateModule { path: String },
    #[error("module {path:?} was called but never declared")]
    UnknownModule { path: String },
}
