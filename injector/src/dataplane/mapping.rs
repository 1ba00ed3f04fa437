//! An array map, mapped into our memory: writing an entry costs no system call.

use std::{marker::PhantomData, num::NonZeroUsize, os::fd::AsFd, ptr::NonNull};

use aya::Pod;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

/// A mapped array of `T`.
#[derive(Debug)]
pub(super) struct Mapping<T: Pod> {
    start: NonNull<T>,
    /// Distance of two entries in bytes: the kernel rounds values up to eight.
    stride: usize,
    entries: usize,
    bytes: NonZeroUsize,
    _values: PhantomData<T>,
}

// SAFETY: the mapping is owned; access goes through `&mut self`, or is atomic.
unsafe impl<T: Pod + Send> Send for Mapping<T> {}
// SAFETY: as above.
unsafe impl<T: Pod + Sync> Sync for Mapping<T> {}

impl<T: Pod> Mapping<T> {
    /// Maps the array behind `map`, which has `entries` entries.
    pub(super) fn new(map: impl AsFd, entries: u32) -> nix::Result<Self> {
        let stride = size_of::<T>().next_multiple_of(8);
        let entries = entries as usize;
        let page = usize::try_from(
            nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE)?.unwrap_or(4096),
        )
        .unwrap_or(4096);
        let bytes = NonZeroUsize::new((stride * entries).next_multiple_of(page))
            .ok_or(nix::errno::Errno::EINVAL)?;
        // SAFETY: a new shared mapping at an address of the kernel's choice.
        let start = unsafe {
            mmap(
                None,
                bytes,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_SHARED,
                map,
                0,
            )
        }?;
        Ok(Self {
            start: start.cast(),
            stride,
            entries,
            bytes,
            _values: PhantomData,
        })
    }

    fn place(&self, index: usize) -> *mut T {
        assert!(
            index < self.entries,
            "entry {index} of a map of {}",
            self.entries
        );
        // SAFETY: within the mapping.
        unsafe { self.start.as_ptr().byte_add(index * self.stride) }
    }

    /// Writes an entry that no program reads now.
    pub(super) fn write(&mut self, index: usize, value: T) {
        // SAFETY: within the mapping, and aligned: strides are multiples of eight.
        unsafe { self.place(index).write_volatile(value) }
    }

    /// Reads an entry.
    pub(super) fn read(&self, index: usize) -> T {
        // SAFETY: as in `write`.
        unsafe { self.place(index).read_volatile() }
    }

    /// The address of an entry, for atomic access to its fields.
    pub(super) fn pointer(&self, index: usize) -> *mut T {
        self.place(index)
    }
}

impl<T: Pod> Drop for Mapping<T> {
    fn drop(&mut self) {
        // SAFETY: ours, and nothing points into it any more.
        let unmapped = unsafe { munmap(self.start.cast(), self.bytes.get()) };
        debug_assert!(unmapped.is_ok());
    }
}
