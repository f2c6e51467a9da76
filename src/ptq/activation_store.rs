//! Bookkeeping of live activations under a memory budget.
//!
//! A layer-wise technique carries the activations of all calibration batches through the model. What fits the
//! budget stays where it is; what does not is moved to memory-mapped files. The files never have a name (`O_TMPFILE`),
//! or lose it before anything is written to them where the file system has no nameless files, so that nothing is left
//! whatever way the process ends. The system pages them in and out as it likes: they are no anonymous memory.
//!
//! Memory is counted by storages, not by tensors: views share theirs, and the holders of one are counted.

use std::collections::HashMap;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Mutex;

use rustix::fs::{self, FallocateFlags, Mode, OFlags};
use rustix::io::Errno;
use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result};

/// A storage below this size stays in memory, even over the budget: a file would cost more than it saves.
pub const SMALLEST_FILE: u64 = 16 << 10;

#[derive(Debug)]
struct Storage {
    bytes: u64,
    holders: usize,
    is_resident: bool,
}

/// What the live activations amount to, and what came of the rest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Bytes that are in memory.
    pub resident: u64,
    /// The most that were in memory at once.
    pub peak_resident: u64,
    /// Bytes that are in mapped files.
    pub mapped: u64,
    /// Bytes that were ever written to mapped files.
    pub spilled: u64,
}

/// Counts the memory of live activations and moves what is over the budget to mapped files.
#[derive(Debug)]
pub struct ActivationStore {
    budget: u64,
    /// The part of the budget that running a model takes.
    reserved: u64,
    folder: PathBuf,
    storages: HashMap<usize, Storage>,
    usage: Usage,
    /// Bytes spilled since the allocator last gave memory back.
    untrimmed: u64,
}

impl ActivationStore {
    /// `budget` in bytes; `folder` holds the scratch files, and must exist.
    ///
    /// # Errors
    /// [`Error::Value`] if `folder` is no folder.
    pub fn new(budget: u64, folder: impl Into<PathBuf>) -> Result<Self> {
        let folder = folder.into();
        if !folder.is_dir() {
            return Err(Error::value(
                "scratch_dir",
                "an existing folder",
                folder.display(),
            ));
        }
        Ok(ActivationStore {
            budget,
            reserved: 0,
            folder,
            storages: HashMap::new(),
            usage: Usage::default(),
            untrimmed: 0,
        })
    }

    pub fn usage(&self) -> Usage {
        self.usage
    }

    /// What may be in memory at once: the budget, less what is reserved and what the allocator may keep of it (see
    /// [`trim`](Self::trim)).
    pub fn limit(&self) -> u64 {
        self.budget
            .saturating_sub(self.reserved)
            .saturating_sub(self.kept_by_allocator())
    }

    /// Sets a part of the budget aside for what is not counted here: the tensors within a run of the model on one
    /// batch. What is in memory stays there.
    pub fn reserve(&mut self, bytes: u64) {
        self.reserved = bytes;
    }

    fn kept_by_allocator(&self) -> u64 {
        self.budget / 8
    }

    /// Counts one more holder of the storage `key`. False: it is new and exceeds the [`limit`](Self::limit), and was not
    /// counted; [`spill`](Self::spill) it. Storages of less than 16 KiB always stay.
    ///
    /// `key` identifies the storage as long as somebody holds it, such as its address.
    pub fn hold(&mut self, key: usize, bytes: u64) -> bool {
        if let Some(storage) = self.storages.get_mut(&key) {
            storage.holders += 1;
            return true;
        }
        if bytes >= SMALLEST_FILE && self.usage.resident + bytes > self.limit() {
            return false;
        }
        self.insert(key, bytes, true);
        true
    }

    /// Counts the first holder of a storage that [`spill`](Self::spill) made.
    pub fn hold_mapped(&mut self, key: usize, bytes: u64) {
        self.insert(key, bytes, false);
    }

    /// One holder less. A storage without holders is not counted any more.
    ///
    /// # Errors
    /// [`Error::State`] if nobody holds it.
    pub fn release(&mut self, key: usize) -> Result<()> {
        let storage = self
            .storages
            .get_mut(&key)
            .ok_or_else(|| Error::State(format!("storage {key:#x} is released but not held")))?;
        storage.holders -= 1;
        if storage.holders == 0 {
            let Storage {
                bytes, is_resident, ..
            } = *storage;
            self.storages.remove(&key);
            *self.side(is_resident) -= bytes;
        }
        Ok(())
    }

    /// A copy of `bytes` (uint8, one dimension, any device) in a mapped file: a CPU tensor that can be read and written
    /// as any other. The file lives as long as the tensor's storage.
    ///
    /// # Errors
    /// [`Error::Io`] if the scratch folder cannot take it, the disk being full for example.
    pub fn spill(&mut self, bytes: &Tensor) -> Result<Tensor> {
        let len = bytes.numel() as u64;
        self.untrimmed += len;
        if self.untrimmed > self.kept_by_allocator() {
            self.trim();
        }
        let file = nameless_file(&self.folder, len)?;
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let mut mapped = Tensor::f_from_file(&path, true, len as i64, (Kind::Uint8, Device::Cpu))?;
        mapped.f_copy_(bytes)?;
        self.usage.spilled += len;
        Ok(mapped)
    }

    /// Has the allocator give freed memory back to the system. Happens by itself while spilling; worth calling
    /// after a run of the whole model.
    pub fn trim(&mut self) {
        give_back_freed_memory();
        self.untrimmed = 0;
    }

    fn insert(&mut self, key: usize, bytes: u64, is_resident: bool) {
        let storage = Storage {
            bytes,
            holders: 1,
            is_resident,
        };
        self.storages.insert(key, storage);
        *self.side(is_resident) += bytes;
        self.usage.peak_resident = self.usage.peak_resident.max(self.usage.resident);
    }

    fn side(&mut self, is_resident: bool) -> &mut u64 {
        if is_resident {
            &mut self.usage.resident
        } else {
            &mut self.usage.mapped
        }
    }
}

/// glibc keeps large blocks that are freed between others, and after a while has kept a multiple of the budget.
fn give_back_freed_memory() {
    // SAFETY: the function may be called at any time, and touches free memory only.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Within as many calls with `true` as with `false`, blocks of 128 KiB and more are pages of their own, which go back to
/// the system when they are freed.
///
/// glibc begins like this, but the first large block that is freed moves the threshold up to its size (32 MiB at the
/// most). From then on activations come from the heap, where the holes that they leave are nibbled by small blocks: a
/// run of a model was seen to take as much as all its activations together, though only two were live at a time.
/// Fresh pages cost the time to clear them, so this is for runs under a budget, not for an optimization's loop. In
/// the end the threshold is set to what glibc's own rule comes to. Nothing happens if `MALLOC_MMAP_THRESHOLD_` is set.
pub fn keep_large_blocks_apart(apart: bool) {
    static BLOCKS: Mutex<usize> = Mutex::new(0);
    if std::env::var_os("MALLOC_MMAP_THRESHOLD_").is_some() {
        return;
    }
    let mut blocks = BLOCKS
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    let before = *blocks;
    *blocks = if apart {
        before + 1
    } else {
        before.saturating_sub(1)
    };
    match (before, *blocks) {
        (0, 1) => set_mmap_threshold(128 << 10),
        (1, 0) => set_mmap_threshold(32 << 20),
        _ => {}
    }
}

fn set_mmap_threshold(bytes: libc::c_int) {
    // SAFETY: the function may be called at any time; it sets numbers that later allocations read.
    #[cfg(target_env = "gnu")]
    unsafe {
        // Twice as much at the heap's end before it shrinks: glibc's own proportion.
        libc::mallopt(libc::M_TRIM_THRESHOLD, 2 * bytes);
        libc::mallopt(libc::M_MMAP_THRESHOLD, bytes);
    }
    #[cfg(not(target_env = "gnu"))]
    let _ = bytes;
}

/// A file of `len` bytes, its blocks reserved (writing through a mapping to a full disk would kill the process),
/// and without a name.
fn nameless_file(folder: &Path, len: u64) -> Result<OwnedFd> {
    let failed = |error: Errno| Error::Io {
        path: folder.display().to_string(),
        source: error.into(),
    };
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    let owner = Mode::RUSR | Mode::WUSR;
    let file = match fs::open(folder, flags | OFlags::TMPFILE, owner) {
        Ok(file) => file,
        // The file system, or the kernel, does not know nameless files.
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::NOENT | Errno::INVAL) => {
            static NEXT: AtomicU64 = AtomicU64::new(0);
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            let path = folder.join(format!(".rimet-{}-{number}", std::process::id()));
            let file = fs::open(&path, flags | OFlags::CREATE | OFlags::EXCL, owner);
            let file = file.map_err(failed)?;
            fs::unlink(&path).map_err(failed)?;
            file
        }
        Err(error) => return Err(failed(error)),
    };
    fs::ftruncate(&file, len).map_err(failed)?;
    match fs::fallocate(&file, FallocateFlags::empty(), 0, len.max(1)) {
        Ok(()) | Err(Errno::OPNOTSUPP) => Ok(file),
        Err(error) => Err(failed(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store(budget: u64) -> ActivationStore {
        ActivationStore::new(budget, std::env::temp_dir()).unwrap()
    }

    #[test]
    fn holders_are_counted_and_the_budget_kept() {
        const MB: u64 = 1 << 20;
        let mut store = store(200 * MB);
        store.reserve(75 * MB);
        assert_eq!(store.limit(), 100 * MB, "an eighth is the allocator's");
        assert!(store.hold(1, 60 * MB));
        assert!(
            store.hold(1, 60 * MB),
            "the same storage costs nothing more"
        );
        assert!(!store.hold(2, 41 * MB));
        assert!(store.hold(3, 40 * MB));
        assert_eq!(store.usage().resident, 100 * MB);
        assert!(store.hold(4, 100), "too small for a file");
        store.release(4).unwrap();
        store.release(1).unwrap();
        assert_eq!(store.usage().resident, 100 * MB);
        store.release(1).unwrap();
        assert_eq!(store.usage().resident, 40 * MB);
        assert!(store.hold(2, 41 * MB));
        assert_eq!(store.usage().peak_resident, 100 * MB + 100);
        store.reserve(u64::MAX);
        assert!(!store.hold(5, MB));
        assert!(matches!(store.release(1), Err(Error::State(_))));
    }

    #[test]
    fn spilled_bytes_come_back_and_can_be_written() {
        let mut store = store(0);
        let bytes = Tensor::from_slice(&(0..=255u8).collect::<Vec<_>>());
        assert!(!store.hold(7, SMALLEST_FILE));
        let mut mapped = store.spill(&bytes).unwrap();
        store.hold_mapped(8, 256);
        assert!(mapped.equal(&bytes));
        let _ = mapped.fill_(3);
        assert_eq!(i64::try_from(mapped.sum(Kind::Int64)).unwrap(), 3 * 256);
        assert_eq!(
            store.usage(),
            Usage {
                resident: 0,
                peak_resident: 0,
                mapped: 256,
                spilled: 256
            }
        );
        store.release(8).unwrap();
        assert_eq!(store.usage().mapped, 0);
    }

    #[test]
    fn nothing_is_left_in_the_folder() {
        let folder = std::env::temp_dir().join(format!("rimet-store-{}", std::process::id()));
        std::fs::create_dir(&folder).unwrap();
        let mut store = ActivationStore::new(0, &folder).unwrap();
        let mapped = store
            .spill(&Tensor::zeros([10], (Kind::Uint8, Device::Cpu)))
            .unwrap();
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 0);
        drop(mapped);
        std::fs::remove_dir(&folder).unwrap();
        let error = ActivationStore::new(0, &folder).unwrap_err();
        assert!(error.to_string().starts_with("scratch_dir: "), "{error}");
    }
}
