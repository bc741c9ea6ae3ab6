//! Giving memory back.

/// Returns the memory to the system that was freed in small pieces, which the allocator keeps otherwise: worth its
/// milliseconds after work that took much of it once.
pub fn trim() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes no pointer, and its locks are the allocator's own.
    unsafe {
        libc::malloc_trim(0)
    };
}
