//! The devices and the kernels loaded on them.

use super::cache::{digest, Cache};
use super::driver::{Context, Driver, Function, Stream};
use super::kernel::{self, Kernel, THREADS};
use super::nvrtc::{Nvrtc, Target, OPTIONS};
use super::Failure;
use crate::error::Error;
use std::collections::HashMap;
use std::ffi::{c_void, CString};
use std::sync::{Mutex, OnceLock, PoisonError, RwLock};

/// What serves all devices.
struct Runtime {
    driver: Driver,
    nvrtc: &'static Nvrtc,
    cache: Cache,
}

impl Runtime {
    fn get() -> Result<&'static Runtime, String> {
        static RUNTIME: OnceLock<Result<Runtime, String>> = OnceLock::new();
        RUNTIME
            .get_or_init(|| {
                if std::env::var_os("RIMET_CUDA_KERNELS").is_some_and(|value| value == "0") {
                    return Err("switched off by RIMET_CUDA_KERNELS=0".to_owned());
                }
                Ok(Runtime {
                    driver: Driver::open()?,
                    nvrtc: Nvrtc::get()?,
                    cache: Cache::of_user(),
                })
            })
            .as_ref()
            .map_err(Clone::clone)
    }
}

/// A kernel on a device.
#[derive(Clone, Copy)]
struct Loaded(Function);
// SAFETY: the driver's handles may be used from every thread.
unsafe impl Send for Loaded {}
// SAFETY: as above.
unsafe impl Sync for Loaded {}

/// One device, with the kernels that were used on it so far (or the reason why they cannot be).
pub struct Device {
    runtime: &'static Runtime,
    target: Target,
    context: Context,
    kernels: RwLock<HashMap<Kernel, Result<Loaded, String>>>,
    loading: Mutex<()>,
}
// SAFETY: the context is a handle of the driver; see `Loaded`.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

impl Device {
    /// The device with torch's number `index`.
    fn get(index: i32) -> Result<&'static Device, String> {
        type Devices = HashMap<i32, Result<&'static Device, String>>;
        static DEVICES: OnceLock<RwLock<Devices>> = OnceLock::new();
        let devices = DEVICES.get_or_init(RwLock::default);
        // A poisoned lock holds a map all the same: entries are put in whole.
        if let Some(device) = devices
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&index)
        {
            return device.clone();
        }
        let mut devices = devices.write().unwrap_or_else(PoisonError::into_inner);
        devices
            .entry(index)
            // Devices live as long as the process.
            .or_insert_with(|| Device::new(index).map(|device| &*Box::leak(Box::new(device))))
            .clone()
    }

    fn new(index: i32) -> Result<Device, String> {
        let runtime = Runtime::get()?;
        let (capability, context) = runtime.driver.device(index)?;
        Ok(Device {
            runtime,
            target: runtime.nvrtc.target(capability)?,
            context,
            kernels: RwLock::default(),
            loading: Mutex::default(),
        })
    }

    fn known(&self, kernel: &Kernel) -> Option<Result<Loaded, String>> {
        self.kernels
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(kernel)
            .cloned()
    }

    /// The kernel, loaded if it was not.
    fn kernel(&self, kernel: &Kernel) -> Result<Loaded, String> {
        if let Some(known) = self.known(kernel) {
            return known;
        }
        // One at a time: threads that want the same kernel wait for the first.
        let _loading = self.loading.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = self.known(kernel) {
            return known;
        }
        let result = self.load(kernel);
        if let Err(reason) = &result {
            log::warn!(
                "CUDA kernel {} cannot be used, plain tensor ops take its place: {reason}",
                kernel.name()
            );
        }
        self.kernels
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(*kernel, result.clone());
        result
    }

    /// From the disk, or else compiled.
    fn load(&self, kernel: &Kernel) -> Result<Loaded, String> {
        let Runtime {
            driver,
            nvrtc,
            cache,
        } = self.runtime;
        let name = kernel.name();
        let unit = kernel::unit(&[*kernel]);
        let (major, minor) = nvrtc.version();
        let compiler = format!("{major}.{minor} {} {OPTIONS:?}", self.target);
        let files = kernel::FILES.iter().map(|(_, text)| *text);
        let key = digest(files.chain([unit.as_str(), compiler.as_str()]));
        let file = format!("{name}-{}-{key}", self.target);
        let symbol = CString::new(name.as_str()).expect("names are identifiers");
        let load = |code: &[u8]| {
            driver
                .within(self.context, || driver.load(code, &symbol))
                .map(Loaded)
        };
        if let Some(code) = cache.read(&file) {
            match load(&code) {
                Ok(loaded) => return Ok(loaded),
                Err(reason) => log::debug!("{file} in the cache is of no use: {reason}"),
            }
        }
        let code = nvrtc.compile(&unit, self.target)?;
        let loaded = load(&code)?;
        if let Err(error) = cache.write(&file, &code) {
            log::debug!("{file} cannot be kept in the cache: {error}");
        }
        Ok(loaded)
    }
}

/// How an op reaches its device: made for one call.
pub struct Launcher<'a> {
    device: &'static Device,
    stream: Stream,
    allocate: &'a dyn Fn(usize) -> *mut c_void,
}

impl<'a> Launcher<'a> {
    /// For the device with torch's number `index`. `allocate` gives memory of that device that work put on
    /// `stream` during the call may use, or null.
    pub fn new(
        index: i32,
        stream: Stream,
        allocate: &'a dyn Fn(usize) -> *mut c_void,
    ) -> Result<Self, Failure> {
        Ok(Self {
            device: Device::get(index).map_err(Failure::Unavailable)?,
            stream,
            allocate,
        })
    }

    /// Scratch memory for `n` elements of `T`.
    pub fn scratch<T>(&self, n: u64) -> Result<*mut T, Failure> {
        let memory = (self.allocate)(n as usize * size_of::<T>());
        if memory.is_null() {
            // The allocator's own error takes the place of this one.
            return Err(Error::State("out of device memory".to_owned()).into());
        }
        Ok(memory.cast())
    }

    /// Runs `kernel` over `argument` in so many blocks. None: nothing to do.
    ///
    /// # Safety
    /// `argument` is right for the kernel: its pointers are to device memory of the sizes it says.
    pub unsafe fn launch<A>(
        &self,
        kernel: &Kernel,
        blocks: u64,
        argument: &A,
    ) -> Result<(), Failure> {
        assert_eq!(size_of::<A>(), kernel.argument_bytes, "{}", kernel.name());
        if blocks == 0 {
            return Ok(());
        }
        let blocks = i32::try_from(blocks).map_err(|_| {
            Failure::Unavailable(format!("{blocks} blocks are more than a launch takes"))
        })?;
        let function = self.device.kernel(kernel).map_err(Failure::Unavailable)?.0;
        let driver = &self.device.runtime.driver;
        driver
            .within(self.device.context, || {
                // SAFETY: by the contract; the kernel was loaded into this context.
                unsafe {
                    driver.launch(
                        function,
                        blocks as u32,
                        THREADS as u32,
                        self.stream,
                        argument,
                    )
                }
            })
            .map_err(|reason| {
                Error::State(format!("CUDA kernel {}: {reason}", kernel.name())).into()
            })
    }
}

/// How tensors of a device are computed.
#[derive(Clone, Debug)]
pub struct Status {
    /// By kernels, or else by plain tensor ops.
    pub kernels: bool,
    /// With what, or why not.
    pub reason: String,
}

/// Which path the device with torch's number `index` takes, and why. Opens the driver if nothing has.
pub fn status(index: i32) -> Status {
    match Device::get(index) {
        Ok(device) => {
            let Runtime { nvrtc, cache, .. } = device.runtime;
            let (major, minor) = nvrtc.version();
            let cache = match cache.folder() {
                Some(folder) => folder.display().to_string(),
                None => "nowhere".to_owned(),
            };
            let mut reason = format!(
                "kernels for {}, compiled by NVRTC {major}.{minor} ({}), kept in {cache}",
                device.target,
                nvrtc.path().display()
            );
            let kernels = device
                .kernels
                .read()
                .unwrap_or_else(PoisonError::into_inner);
            for (kernel, loaded) in kernels.iter() {
                if let Err(error) = loaded {
                    reason.push_str(&format!("; without {}: {error}", kernel.name()));
                }
            }
            Status {
                kernels: true,
                reason,
            }
        }
        Err(reason) => Status {
            kernels: false,
            reason: format!("plain tensor operations: {reason}"),
        },
    }
}
