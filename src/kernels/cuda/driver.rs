//! The CUDA driver's functions that we use, from a libcuda that is opened on first need.

use libloading::Library;
use std::ffi::{c_char, c_int, c_uint, c_void, CStr};

type Status = c_int;
/// A device context.
pub type Context = *mut c_void;
/// A loaded module.
pub type Module = *mut c_void;
/// A kernel of a loaded module.
pub type Function = *mut c_void;
/// A stream.
pub type Stream = *mut c_void;

const COMPUTE_CAPABILITY_MAJOR: c_int = 75;
const COMPUTE_CAPABILITY_MINOR: c_int = 76;
const CAPTURE_MODE_RELAXED: c_int = 2;

/// The driver.
pub struct Driver {
    device_get: unsafe extern "C" fn(*mut c_int, c_int) -> Status,
    device_attribute: unsafe extern "C" fn(*mut c_int, c_int, c_int) -> Status,
    primary_context: unsafe extern "C" fn(*mut Context, c_int) -> Status,
    current_context: unsafe extern "C" fn(*mut Context) -> Status,
    push_context: unsafe extern "C" fn(Context) -> Status,
    pop_context: unsafe extern "C" fn(*mut Context) -> Status,
    exchange_capture_mode: unsafe extern "C" fn(*mut c_int) -> Status,
    module_load: unsafe extern "C" fn(*mut Module, *const c_void) -> Status,
    module_function: unsafe extern "C" fn(*mut Function, Module, *const c_char) -> Status,
    #[allow(clippy::type_complexity)]
    launch: unsafe extern "C" fn(
        Function,
        c_uint,
        c_uint,
        c_uint,
        c_uint,
        c_uint,
        c_uint,
        c_uint,
        Stream,
        *mut *mut c_void,
        *mut *mut c_void,
    ) -> Status,
    error_string: unsafe extern "C" fn(Status, *mut *const c_char) -> Status,
    _library: Library,
}

impl Driver {
    /// Opens `RIMET_LIBCUDA`, or the libcuda that the loader finds, and initializes it.
    ///
    /// # Errors
    /// Why there is none.
    pub fn open() -> Result<Self, String> {
        let path = std::env::var_os("RIMET_LIBCUDA").unwrap_or_else(|| "libcuda.so.1".into());
        // SAFETY: libcuda's initializers have no conditions. The types are those of cuda.h; the pointers
        // live as long as the library, which moves into the same struct.
        unsafe {
            let library =
                Library::new(&path).map_err(|error| format!("no CUDA driver: {error}"))?;
            macro_rules! symbol {
                ($name:literal) => {
                    *library
                        .get($name)
                        .map_err(|error| format!("the CUDA driver is too old: {error}"))?
                };
            }
            let init: unsafe extern "C" fn(c_uint) -> Status = symbol!(b"cuInit\0");
            let driver = Self {
                device_get: symbol!(b"cuDeviceGet\0"),
                device_attribute: symbol!(b"cuDeviceGetAttribute\0"),
                primary_context: symbol!(b"cuDevicePrimaryCtxRetain\0"),
                current_context: symbol!(b"cuCtxGetCurrent\0"),
                push_context: symbol!(b"cuCtxPushCurrent_v2\0"),
                pop_context: symbol!(b"cuCtxPopCurrent_v2\0"),
                exchange_capture_mode: symbol!(b"cuThreadExchangeStreamCaptureMode\0"),
                module_load: symbol!(b"cuModuleLoadData\0"),
                module_function: symbol!(b"cuModuleGetFunction\0"),
                launch: symbol!(b"cuLaunchKernel\0"),
                error_string: symbol!(b"cuGetErrorString\0"),
                _library: library,
            };
            driver.check("cuInit", init(0))?;
            Ok(driver)
        }
    }

    fn check(&self, call: &str, status: Status) -> Result<(), String> {
        if status == 0 {
            return Ok(());
        }
        let mut text: *const c_char = std::ptr::null();
        // SAFETY: the driver answers a static string, or leaves the pointer null.
        let text = unsafe {
            (self.error_string)(status, &mut text);
            if text.is_null() {
                "unknown error".into()
            } else {
                CStr::from_ptr(text).to_string_lossy()
            }
        };
        Err(format!("{call}: {text} (status {status})"))
    }

    /// Compute capability (`major * 10 + minor`) and primary context, which is the one torch uses, of the
    /// device with this number.
    pub fn device(&self, index: i32) -> Result<(u32, Context), String> {
        let (mut device, mut major, mut minor) = (0, 0, 0);
        let mut context = std::ptr::null_mut();
        // SAFETY: the pointers are to locals of the right types.
        unsafe {
            self.check("cuDeviceGet", (self.device_get)(&mut device, index))?;
            for (value, attribute) in [
                (&mut major, COMPUTE_CAPABILITY_MAJOR),
                (&mut minor, COMPUTE_CAPABILITY_MINOR),
            ] {
                self.check(
                    "cuDeviceGetAttribute",
                    (self.device_attribute)(value, attribute, device),
                )?;
            }
            self.check(
                "cuDevicePrimaryCtxRetain",
                (self.primary_context)(&mut context, device),
            )?;
        }
        Ok(((major * 10 + minor) as u32, context))
    }

    /// Runs `body` with `context` as this thread's current one.
    pub fn within<R>(
        &self,
        context: Context,
        body: impl FnOnce() -> Result<R, String>,
    ) -> Result<R, String> {
        let mut current = std::ptr::null_mut();
        // SAFETY: the context is a retained one, and what is pushed is popped.
        unsafe {
            self.check("cuCtxGetCurrent", (self.current_context)(&mut current))?;
            if current == context {
                return body();
            }
            self.check("cuCtxPushCurrent", (self.push_context)(context))?;
            let result = body();
            self.check("cuCtxPopCurrent", (self.pop_context)(&mut current))?;
            result
        }
    }

    /// Loads machine code or PTX into the current context, where it stays, and finds a kernel in it. May be
    /// called while the stream is captured into a graph: loading is no work on a stream.
    pub fn load(&self, code: &[u8], name: &CStr) -> Result<Function, String> {
        let mut module = std::ptr::null_mut();
        let mut function = std::ptr::null_mut();
        let mut mode = CAPTURE_MODE_RELAXED;
        // SAFETY: `code` is an ELF file, which knows its size, or PTX with the NUL that NVRTC ends it with.
        unsafe {
            self.check(
                "cuThreadExchangeStreamCaptureMode",
                (self.exchange_capture_mode)(&mut mode),
            )?;
            let loaded = self.check(
                "cuModuleLoadData",
                (self.module_load)(&mut module, code.as_ptr().cast()),
            );
            self.check(
                "cuThreadExchangeStreamCaptureMode",
                (self.exchange_capture_mode)(&mut mode),
            )?;
            loaded?;
            self.check(
                "cuModuleGetFunction",
                (self.module_function)(&mut function, module, name.as_ptr()),
            )?;
        }
        Ok(function)
    }

    /// Launches a kernel that takes one struct.
    ///
    /// # Safety
    /// `function` is a kernel of the current context whose argument is an `A` that is right for it;
    /// what it points to stays valid until the stream has got there.
    pub unsafe fn launch<A>(
        &self,
        function: Function,
        blocks: c_uint,
        threads: c_uint,
        stream: Stream,
        argument: &A,
    ) -> Result<(), String> {
        let mut arguments = [std::ptr::from_ref(argument).cast_mut().cast::<c_void>()];
        // SAFETY: by the contract; the driver copies the argument before it returns.
        unsafe {
            self.check(
                "cuLaunchKernel",
                (self.launch)(
                    function,
                    blocks,
                    1,
                    1,
                    threads,
                    1,
                    1,
                    0,
                    stream,
                    arguments.as_mut_ptr(),
                    std::ptr::null_mut(),
                ),
            )
        }
    }
}
