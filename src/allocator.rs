//! How freed memory is kept.

/// Makes the C library's allocator keep what was freed instead of giving every large tensor back to the system.
///
/// A step allocates and frees gigabytes, and memory fresh from the system costs a page fault for every 4 KiB: about as
/// much time as the arithmetic. Does nothing where the C library is not glibc. To be called before the first thread is
/// started.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        // SAFETY: mallopt takes two integers, touches no memory of ours, and is called before any thread that could
        // allocate at the same time. Values it does not accept are ignored.
        #[expect(unsafe_code, reason = "the allocator's settings are a C function")]
        unsafe {
            libc::mallopt(libc::M_MMAP_THRESHOLD, 1 << 30);
            libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX);
            libc::mallopt(libc::M_TOP_PAD, 64 << 20);
            // one heap for all threads: those of other threads are made of pieces of 64 MiB, which hold few large tensors
            // each and go back to the system when they are empty
            libc::mallopt(libc::M_ARENA_MAX, 1);
        }
    }
}
