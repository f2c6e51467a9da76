//! The instances of the templates in `csrc/cuda`, and the text that NVRTC compiles for them.

macro_rules! files {
    ($($name:literal),* $(,)?) => {
        [$(($name, include_str!(concat!("../../../csrc/cuda/", $name)))),*]
    };
}

/// The files of `csrc/cuda`, by the names they include each other with.
pub const FILES: [(&str, &str); 13] = files![
    "device.cuh",
    "geometry.cuh",
    "elementwise.cuh",
    "reduce.cuh",
    "functor.cuh",
    "math.cuh",
    "range.cuh",
    "adaround.cu",
    "affine.cu",
    "float.cu",
    "min_max.cu",
    "range.cu",
    "seq_mse.cu",
];

/// Threads of a block; twin of `kThreads` in `device.cuh`.
pub const THREADS: u64 = 256;
/// 16-byte accesses of a thread in `elementwise`; twin of `kAccesses`.
pub const ACCESSES: u64 = 2;

/// One entry point: `function<functor<types..>>`, or `function<types..>` if there is no functor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Kernel {
    /// The file that defines it.
    pub file: &'static str,
    /// The function that threads run.
    pub function: &'static str,
    /// What it is a template of, or nothing.
    pub functor: &'static str,
    /// The innermost template arguments; empty ones do not count.
    pub types: [&'static str; 3],
    /// Size of the argument struct, which the compiler checks.
    pub argument_bytes: usize,
}

impl Kernel {
    /// The symbol: a C name that is made of the parts.
    pub fn name(&self) -> String {
        let mut parts = vec![self.function, self.functor];
        parts.extend(self.types);
        parts.retain(|part| !part.is_empty());
        parts.join("_")
    }

    fn declaration(&self) -> String {
        let types: Vec<&str> = self.types.into_iter().filter(|t| !t.is_empty()).collect();
        let types = types.join(", ");
        let template = if self.functor.is_empty() {
            types
        } else {
            format!("{}<{types}>", self.functor)
        };
        format!(
            "RIMET_KERNEL({}, {}, {}<{template}>)\n",
            self.name(),
            self.argument_bytes,
            self.function
        )
    }
}

/// A translation unit that defines the entry points of `kernels`.
pub fn unit(kernels: &[Kernel]) -> String {
    let mut files: Vec<&str> = kernels.iter().map(|kernel| kernel.file).collect();
    files.sort_unstable();
    files.dedup();
    let mut text: String = files
        .iter()
        .map(|file| format!("#include \"{file}\"\n"))
        .collect();
    text.push_str("using namespace rimet;\n");
    text.extend(kernels.iter().map(Kernel::declaration));
    text
}

/// A type that tensors hold, as kernels know it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stored {
    /// Its name in `csrc/cuda`.
    pub name: &'static str,
    /// The name of the type that kernels compute in for it.
    pub compute: &'static str,
    /// Its size in bytes.
    pub bytes: u64,
}

impl Stored {
    /// The four dtypes.
    pub const ALL: [Stored; 4] = [
        Stored::new("f16", "float", 2),
        Stored::new("bf16", "float", 2),
        Stored::new("float", "float", 4),
        Stored::new("double", "double", 8),
    ];

    const fn new(name: &'static str, compute: &'static str, bytes: u64) -> Self {
        Self {
            name,
            compute,
            bytes,
        }
    }

    /// Elements of a 16-byte access; twin of `kWidth`.
    pub const fn width(&self) -> u64 {
        16 / self.bytes
    }

    /// Whether kernels compute in float64 for it.
    pub fn is_double(&self) -> bool {
        self.compute == "double"
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn names_are_unique_c_identifiers() {
        let all = super::super::kernels();
        let names: HashSet<String> = all.iter().map(Kernel::name).collect();
        assert_eq!(names.len(), all.len());
        assert!(names
            .iter()
            .all(|name| name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')));
    }

    #[test]
    fn every_file_of_the_folder_is_listed() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/csrc/cuda");
        let mut found: Vec<String> = std::fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        found.sort();
        let mut listed: Vec<&str> = FILES.iter().map(|(name, _)| *name).collect();
        listed.sort_unstable();
        assert_eq!(found, listed);
    }
}
