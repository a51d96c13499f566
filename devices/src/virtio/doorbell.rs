//! Notifications that never become an access of the function.
//!
//! A driver notifies a queue by writing the queue's index, two bytes, to an address of its own (virtio 1.2, section
//! 4.1.5.2). Whoever can catch exactly that write, as KVM can with an ioeventfd, saves the way through the function: it
//! calls [`QueueHandler::process_queue`](super::QueueHandler::process_queue) where it likes. Any other write, of another
//! width or value, comes to the function as ever.

/// Whoever catches notifications.
pub trait Doorbells: Send {
    /// From now on the queues are notified at these addresses, the first queue's first, and nowhere else; an empty slice
    /// is nowhere at all. What cannot be caught the function hears.
    fn hang(&mut self, addresses: &[u64]);
}
