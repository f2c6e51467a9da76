//! NVRTC, NVIDIA's run-time compiler, opened from where torch's wheel has it.

use super::kernel::{self, Kernel};
use libloading::Library;
use std::ffi::{c_char, c_int, CStr, CString, OsStr};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

extern "C" {
    fn rimet_torch_library() -> *const c_char;
}

type Program = *mut std::ffi::c_void;
type Status = c_int;

/// The functions of NVRTC that we use.
pub struct Nvrtc {
    create: unsafe extern "C" fn(
        *mut Program,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> Status,
    compile: unsafe extern "C" fn(Program, c_int, *const *const c_char) -> Status,
    destroy: unsafe extern "C" fn(*mut Program) -> Status,
    log_size: unsafe extern "C" fn(Program, *mut usize) -> Status,
    log: unsafe extern "C" fn(Program, *mut c_char) -> Status,
    cubin_size: unsafe extern "C" fn(Program, *mut usize) -> Status,
    cubin: unsafe extern "C" fn(Program, *mut c_char) -> Status,
    ptx_size: unsafe extern "C" fn(Program, *mut usize) -> Status,
    ptx: unsafe extern "C" fn(Program, *mut c_char) -> Status,
    error_string: unsafe extern "C" fn(Status) -> *const c_char,
    version: (c_int, c_int),
    architectures: Vec<u32>,
    path: PathBuf,
    // NVRTC opens its built-in library by name; that finds the one that is open already.
    _builtins: Option<Library>,
    _library: Library,
}

/// What to compile for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Machine code of compute capability `major * 10 + minor`.
    Machine(u32),
    /// PTX of that capability, which the driver translates for a newer device.
    Virtual(u32),
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Target::Machine(capability) => write!(f, "sm_{capability}"),
            Target::Virtual(capability) => write!(f, "compute_{capability}"),
        }
    }
}

/// Options beside the architecture. No fused multiply-add: results are the CPU's, bit for bit.
pub const OPTIONS: [&str; 2] = ["--std=c++17", "--fmad=false"];

impl Nvrtc {
    /// NVRTC, opened once per process.
    ///
    /// # Errors
    /// Why it cannot be had.
    pub fn get() -> Result<&'static Nvrtc, String> {
        static NVRTC: OnceLock<Result<Nvrtc, String>> = OnceLock::new();
        NVRTC.get_or_init(open).as_ref().map_err(Clone::clone)
    }

    /// Major and minor version.
    pub fn version(&self) -> (i32, i32) {
        self.version
    }

    /// The file it was opened from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What to compile for a device of this compute capability (`major * 10 + minor`).
    ///
    /// # Errors
    /// A sentence, if the device is older than what this NVRTC knows.
    pub fn target(&self, capability: u32) -> Result<Target, String> {
        target(&self.architectures, capability)
    }

    /// Compiles a translation unit that may include the files of `csrc/cuda`.
    ///
    /// # Errors
    /// The compiler's log.
    pub fn compile(&self, unit: &str, target: Target) -> Result<Vec<u8>, String> {
        let strings = |texts: &[&str]| -> Vec<CString> {
            texts
                .iter()
                .map(|text| CString::new(*text).expect("our sources hold no NUL"))
                .collect()
        };
        let pointers = |strings: &[CString]| -> Vec<*const c_char> {
            strings.iter().map(|s| s.as_ptr()).collect()
        };
        let source = CString::new(unit).expect("our sources hold no NUL");
        let names = strings(&kernel::FILES.map(|(name, _)| name));
        let texts = strings(&kernel::FILES.map(|(_, text)| text));
        let architecture = format!("--gpu-architecture={target}");
        let options = strings(&[architecture.as_str(), OPTIONS[0], OPTIONS[1]]);
        let mut program: Program = std::ptr::null_mut();
        // SAFETY: every pointer is to a NUL-terminated string that outlives the calls; buffers have the
        // sizes that NVRTC asks for; the program is destroyed once, after its last use.
        unsafe {
            self.check((self.create)(
                &mut program,
                source.as_ptr(),
                c"rimet.cu".as_ptr(),
                kernel::FILES.len() as c_int,
                pointers(&texts).as_ptr(),
                pointers(&names).as_ptr(),
            ))?;
            let options = pointers(&options);
            let status = (self.compile)(program, options.len() as c_int, options.as_ptr());
            let result = if status == 0 {
                match target {
                    Target::Machine(_) => self.read(program, self.cubin_size, self.cubin),
                    Target::Virtual(_) => self.read(program, self.ptx_size, self.ptx),
                }
            } else {
                let log = self
                    .read(program, self.log_size, self.log)
                    .unwrap_or_default();
                Err(format!(
                    "NVRTC cannot compile for {target}: {}",
                    String::from_utf8_lossy(&log).trim_end_matches(['\0', '\n'])
                ))
            };
            (self.destroy)(&mut program);
            result
        }
    }

    /// # Safety
    /// `size` and `get` are a pair of NVRTC's functions, `program` is alive.
    unsafe fn read(
        &self,
        program: Program,
        size: unsafe extern "C" fn(Program, *mut usize) -> Status,
        get: unsafe extern "C" fn(Program, *mut c_char) -> Status,
    ) -> Result<Vec<u8>, String> {
        let mut bytes = 0;
        // SAFETY: by the contract; the buffer is as large as asked for.
        unsafe {
            self.check(size(program, &mut bytes))?;
            let mut buffer = vec![0_u8; bytes];
            self.check(get(program, buffer.as_mut_ptr().cast()))?;
            Ok(buffer)
        }
    }

    fn check(&self, status: Status) -> Result<(), String> {
        if status == 0 {
            return Ok(());
        }
        // SAFETY: NVRTC answers static strings, also for statuses it does not know.
        let text = unsafe { CStr::from_ptr((self.error_string)(status)) };
        Err(format!("NVRTC: {}", text.to_string_lossy()))
    }
}

/// Exact machine code if NVRTC knows the device, else PTX of the newest capability below it.
fn target(architectures: &[u32], capability: u32) -> Result<Target, String> {
    if architectures.contains(&capability) {
        return Ok(Target::Machine(capability));
    }
    architectures
        .iter()
        .copied()
        .filter(|&known| known < capability)
        .max()
        .map(Target::Virtual)
        .ok_or_else(|| format!("NVRTC compiles for no device as old as sm_{capability}"))
}

/// Where NVRTC may lie: `RIMET_LIBNVRTC` alone if it is set; else beside torch, then in the wheels that
/// torch depends on, then wherever the loader looks.
fn candidates() -> Vec<PathBuf> {
    if let Some(path) = std::env::var_os("RIMET_LIBNVRTC") {
        return vec![path.into()];
    }
    let mut found = Vec::new();
    // SAFETY: a static, NUL-terminated string.
    let torch = unsafe { CStr::from_ptr(rimet_torch_library()) };
    let torch = PathBuf::from(torch.to_string_lossy().into_owned());
    if let Some(lib) = torch.parent() {
        let mut folders = vec![lib.to_path_buf()];
        if let Some(site_packages) = lib.parent().and_then(Path::parent) {
            folders.extend(
                entries(&site_packages.join("nvidia"))
                    .into_iter()
                    .map(|wheel| wheel.join("lib")),
            );
        }
        for folder in folders {
            found.extend(
                entries(&folder)
                    .into_iter()
                    .filter(|file| starts_with(file, "libnvrtc.so")),
            );
        }
    }
    found.extend(["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"].map(PathBuf::from));
    found
}

/// The entries of a folder, sorted; none if it cannot be read.
fn entries(folder: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> = std::fs::read_dir(folder)
        .map(|entries| entries.flatten().map(|entry| entry.path()).collect())
        .unwrap_or_default();
    paths.sort();
    paths
}

fn starts_with(file: &Path, prefix: &str) -> bool {
    file.file_name()
        .and_then(OsStr::to_str)
        .is_some_and(|name| name.starts_with(prefix))
}

fn open() -> Result<Nvrtc, String> {
    let mut reasons = Vec::new();
    for path in candidates() {
        // SAFETY: NVRTC's initializers have no conditions.
        match unsafe { Library::new(&path) } {
            Ok(library) => return load(library, path),
            Err(error) => reasons.push(error.to_string()),
        }
    }
    Err(format!(
        "NVRTC cannot be opened ({})",
        reasons.pop().unwrap_or_default()
    ))
}

fn load(library: Library, path: PathBuf) -> Result<Nvrtc, String> {
    let builtins = path
        .parent()
        .and_then(|folder| {
            entries(folder)
                .into_iter()
                .find(|file| starts_with(file, "libnvrtc-builtins.so"))
        })
        // SAFETY: as for NVRTC itself.
        .and_then(|file| unsafe { Library::new(file) }.ok());
    // SAFETY: the types are those of nvrtc.h, which has kept them since version 11.2. The pointers live as
    // long as the library, which moves into the same struct.
    unsafe {
        macro_rules! symbol {
            ($name:literal) => {
                *library
                    .get($name)
                    .map_err(|error| format!("{}: {error}", path.display()))?
            };
        }
        let version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> Status =
            symbol!(b"nvrtcVersion\0");
        let count: unsafe extern "C" fn(*mut c_int) -> Status =
            symbol!(b"nvrtcGetNumSupportedArchs\0");
        let list: unsafe extern "C" fn(*mut c_int) -> Status = symbol!(b"nvrtcGetSupportedArchs\0");
        let mut nvrtc = Nvrtc {
            create: symbol!(b"nvrtcCreateProgram\0"),
            compile: symbol!(b"nvrtcCompileProgram\0"),
            destroy: symbol!(b"nvrtcDestroyProgram\0"),
            log_size: symbol!(b"nvrtcGetProgramLogSize\0"),
            log: symbol!(b"nvrtcGetProgramLog\0"),
            cubin_size: symbol!(b"nvrtcGetCUBINSize\0"),
            cubin: symbol!(b"nvrtcGetCUBIN\0"),
            ptx_size: symbol!(b"nvrtcGetPTXSize\0"),
            ptx: symbol!(b"nvrtcGetPTX\0"),
            error_string: symbol!(b"nvrtcGetErrorString\0"),
            version: (0, 0),
            architectures: Vec::new(),
            path,
            _builtins: builtins,
            _library: library,
        };
        let (mut major, mut minor, mut n) = (0, 0, 0);
        nvrtc.check(version(&mut major, &mut minor))?;
        nvrtc.version = (major, minor);
        nvrtc.check(count(&mut n))?;
        let mut architectures = vec![0; n as usize];
        nvrtc.check(list(architectures.as_mut_ptr()))?;
        nvrtc.architectures = architectures.into_iter().map(|a| a as u32).collect();
        Ok(nvrtc)
    }
}

/// Compiles kernels to machine code of a compute capability (`major * 10 + minor`), without a device.
///
/// # Errors
/// Why NVRTC cannot be had, or its log.
pub fn compile(kernels: &[Kernel], capability: u32) -> Result<Vec<u8>, String> {
    Nvrtc::get()?.compile(&kernel::unit(kernels), Target::Machine(capability))
}

#[cfg(test)]
mod tests {
    use super::super::cache::{digest, Cache};
    use super::*;

    #[test]
    fn newer_devices_get_ptx_and_older_ones_a_reason() {
        let known = [75, 80, 90, 120];
        assert_eq!(target(&known, 90).unwrap(), Target::Machine(90));
        assert_eq!(target(&known, 87).unwrap(), Target::Virtual(80));
        assert_eq!(target(&known, 130).unwrap(), Target::Virtual(120));
        assert!(target(&known, 70).unwrap_err().contains("sm_70"));
    }

    /// What was compiled once from the same text need not be compiled in the next run of the tests.
    fn compiled(kernels: &[Kernel], capability: u32) -> Vec<u8> {
        let cache = Cache::at(concat!(env!("CARGO_MANIFEST_DIR"), "/target/cuda"));
        let unit = kernel::unit(kernels);
        let files = kernel::FILES.iter().map(|(_, text)| *text);
        let version = format!("{:?} {OPTIONS:?}", Nvrtc::get().unwrap().version());
        let key = digest(files.chain([unit.as_str(), version.as_str()]));
        let name = format!("all-sm_{capability}-{key}");
        cache.read(&name).unwrap_or_else(|| {
            let cubin = compile(kernels, capability).unwrap();
            cache.write(&name, &cubin).unwrap();
            cubin
        })
    }

    #[test]
    fn every_kernel_compiles_for_every_architecture() {
        let kernels = &super::super::kernels();
        std::thread::scope(|scope| {
            for half in [&[75, 80, 86, 89][..], &[90, 100, 120]] {
                scope.spawn(move || {
                    for &capability in half {
                        let cubin = compiled(kernels, capability);
                        assert!(cubin.starts_with(b"\x7fELF"), "sm_{capability}");
                        for kernel in kernels {
                            let name = kernel.name().into_bytes();
                            assert!(
                                cubin.windows(name.len()).any(|window| window == name),
                                "sm_{capability} lacks {}",
                                kernel.name()
                            );
                        }
                    }
                });
            }
        });
    }

    #[test]
    fn errors_of_the_compiler_are_told() {
        let error = Nvrtc::get()
            .unwrap()
            .compile("#include \"device.cuh\"\nnonsense", Target::Machine(90))
            .unwrap_err();
        assert!(
            error.contains("nonsense") && error.contains("sm_90"),
            "{error}"
        );
    }
}
