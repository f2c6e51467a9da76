//! Compiled kernels on disk: one file each, written whole or not at all.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// A folder of compiled kernels.
pub struct Cache {
    folder: Option<PathBuf>,
}

impl Cache {
    /// The user's: `RIMET_CACHE_DIR`, or `rimet` in `XDG_CACHE_HOME`, or `~/.cache/rimet`; of these the
    /// sub-folder `cuda`.
    pub fn of_user() -> Self {
        let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty());
        let folder = variable("RIMET_CACHE_DIR").map(PathBuf::from).or_else(|| {
            variable("XDG_CACHE_HOME")
                .map(PathBuf::from)
                .or_else(|| Some(PathBuf::from(variable("HOME")?).join(".cache")))
                .map(|caches| caches.join("rimet"))
        });
        Self {
            folder: folder.map(|folder| folder.join("cuda")),
        }
    }

    /// In this folder, which is made when it is needed.
    #[cfg(test)]
    pub fn at(folder: impl Into<PathBuf>) -> Self {
        Self {
            folder: Some(folder.into()),
        }
    }

    /// The folder, if there is one.
    pub fn folder(&self) -> Option<&Path> {
        self.folder.as_deref()
    }

    /// What was kept under this name.
    pub fn read(&self, name: &str) -> Option<Vec<u8>> {
        std::fs::read(self.folder.as_ref()?.join(name)).ok()
    }

    /// Keeps `bytes`. A cache that cannot be written costs time, not results: the answer is for the log.
    pub fn write(&self, name: &str, bytes: &[u8]) -> std::io::Result<()> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let Some(folder) = &self.folder else {
            return Ok(());
        };
        std::fs::create_dir_all(folder)?;
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let unfinished = folder.join(format!("{name}.{}.{number}", std::process::id()));
        std::fs::write(&unfinished, bytes)
            .and_then(|()| std::fs::rename(&unfinished, folder.join(name)))
            .inspect_err(|_| drop(std::fs::remove_file(&unfinished)))
    }
}

/// FNV-1a of 128 bits over parts: a key for file names, not a defence against forgery.
pub fn digest<'a>(parts: impl IntoIterator<Item = &'a str>) -> String {
    let mut hash = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d_u128;
    let mut add = |byte: u8| {
        hash = (hash ^ u128::from(byte)).wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b);
    };
    for part in parts {
        part.bytes().for_each(&mut add);
        // A part's end: "ab", "c" is not "a", "bc".
        add(0xff);
    }
    format!("{hash:032x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_nothing_else_is_left() {
        let folder = std::env::temp_dir().join(format!("rimet-cache-{}", std::process::id()));
        let cache = Cache::at(&folder);
        assert_eq!(cache.read("a.cubin"), None);
        cache.write("a.cubin", b"one").unwrap();
        cache.write("a.cubin", b"two").unwrap();
        assert_eq!(cache.read("a.cubin").unwrap(), b"two");
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1);
        std::fs::remove_dir_all(&folder).unwrap();
        // A folder that cannot be made.
        let cache = Cache::at("/proc/nowhere");
        assert!(cache.write("a.cubin", b"one").is_err());
    }

    #[test]
    fn the_digest_tells_parts_apart() {
        assert_ne!(digest(["ab", "c"]), digest(["a", "bc"]));
        assert_eq!(digest(["ab", "c"]), digest(["ab", "c"]));
    }
}
