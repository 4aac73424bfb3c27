//! `Receiver` and `Received`: what arrives over an association, read without the interpreter.

use std::ffi::c_int;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use dicomnode_core::bytes::Bytes;
use dicomnode_core::digest::Kind;
use dicomnode_core::hashing::{self, Coming};
use dicomnode_core::incoming::{self, Growing, Incoming};
use dicomnode_core::meta::prefix;
use dicomnode_core::receive as core;
use dicomnode_core::{Error, Result};
use pyo3::exceptions::PyValueError;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyMemoryView};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt::set_tcp_quickack;
use rustix::net::{RecvFlags, SendFlags, recv, send};

use crate::digest::kind_of;
use crate::errors::detached;

/// Parses one association's bytes into C-STORE requests (PS3.7 section 9.1.1).
///
/// `contexts` are the accepted presentation contexts: ID and transfer syntax. `socket` is read by `receive`; it
/// is duplicated, so that the caller may close it at any time. Of a dataset at most `memory` bytes are held.
/// `digest_size` tells the kind of the digests, as in `digest`. With `folder` each image is written to a Part 10
/// file there while it arrives, unless less than `least_free` bytes are free; `title` is the AE title of its sender.
///
/// Raises OSError where the socket cannot be duplicated.
#[pyclass(frozen, module = "dicomnode._core")]
pub struct Receiver {
    state: Mutex<State>,
    answers: Arc<Mutex<Answers>>,
    kind: Kind,
    arriving: AtomicUsize,
    is_arriving: AtomicBool,
    is_large: AtomicBool,
    total: AtomicU64,
}

struct State {
    parser: core::Receiver,
    /// None where images are kept in memory.
    incoming: Option<Incoming>,
    kept: Kept,
}

/// How images are answered.
struct Answers {
    socket: Option<Arc<OwnedFd>>,
    /// Of the last answer.
    unsent: Vec<u8>,
    /// Whether there was one since the last time that something was read.
    is_new: bool,
}

impl Answers {
    /// Send an answer, as much as the socket takes at once.
    fn give(&mut self, response: &[u8]) {
        self.is_new = true;
        self.unsent = match &self.socket {
            Some(socket) => rest_of(socket.as_fd(), response),
            None => response.to_vec(),
        };
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What of the dataset that is arriving is in a file.
#[derive(Default)]
struct Kept {
    /// None also where nothing can be kept.
    file: Option<Growing>,
    is_begun: bool,
    /// Of the bytes in memory so many are written, too.
    written: usize,
    /// Whether the dataset is too large for memory.
    is_large: bool,
    errno: Option<i32>,
}

impl Kept {
    /// Write what has come and is not written yet, whole parts of it where it is not the last; after a
    /// failure nothing is kept. Whether anything was to be written.
    fn write(
        &mut self,
        incoming: Option<&mut Incoming>,
        store: &core::Store,
        is_last: bool,
    ) -> bool {
        let Some(incoming) = incoming else {
            return false;
        };
        if !self.is_begun {
            self.is_begun = true;
            match incoming.begin(store) {
                Ok(file) => self.file = file,
                Err(error) => self.errno = Some(error.raw_os_error()),
            }
        }
        let Some(file) = &mut self.file else {
            return false;
        };
        match incoming.write(file, &store.dataset[self.written..], is_last) {
            Ok(count) => {
                self.written += count;
                count > 0
            }
            Err(error) => {
                // What it took is free again at once.
                self.file = None;
                self.errno = Some(error.raw_os_error());
                false
            }
        }
    }
}

/// After so many bytes the caller looks how much memory is taken.
const MOST_UNSEEN: u64 = 32 << 20;

enum Outcome {
    Nothing,
    Closed,
    Pass(Vec<u8>),
    Store(Box<core::Store>, Kept, Arc<Bytes>, Coming),
}

#[pymethods]
impl Receiver {
    #[new]
    #[pyo3(signature = (
        contexts, pdu, dataset, memory, socket = None, digest_size = 32, folder = None,
        least_free = 0, title = "",
    ))]
    #[expect(clippy::too_many_arguments, reason = "they have names in Python")]
    fn new(
        contexts: Vec<(u8, String)>,
        pdu: u32,
        dataset: u64,
        memory: usize,
        socket: Option<c_int>,
        digest_size: usize,
        folder: Option<PathBuf>,
        least_free: u64,
        title: &str,
    ) -> PyResult<Self> {
        let kind = kind_of(digest_size)?;
        let socket = match socket {
            None => None,
            Some(number) if number < 0 => {
                return Err(PyValueError::new_err("expected an open socket"));
            }
            // SAFETY: the caller keeps it open during this call.
            Some(number) => Some(unsafe { BorrowedFd::borrow_raw(number) }.try_clone_to_owned()?),
        };
        let limits = core::Limits {
            pdu,
            dataset,
            memory,
        };
        let numbers = contexts.iter().map(|(number, _)| *number).collect();
        let incoming = folder.map(|folder| Incoming {
            folder,
            least_free,
            title: title.to_owned(),
            syntaxes: contexts,
            spare: None,
        });
        Ok(Receiver {
            state: Mutex::new(State {
                parser: core::Receiver::new(numbers, limits, kind),
                incoming,
                kept: Kept::default(),
            }),
            answers: Arc::new(Mutex::new(Answers {
                socket: socket.map(Arc::new),
                unsent: Vec::new(),
                is_new: false,
            })),
            kind,
            arriving: AtomicUsize::new(0),
            is_arriving: AtomicBool::new(false),
            is_large: AtomicBool::new(false),
            total: AtomicU64::new(0),
        })
    }

    /// Bytes of the dataset that is arriving which are in memory.
    #[getter]
    fn arriving(&self) -> usize {
        self.arriving.load(Ordering::Relaxed)
    }

    /// Whether an image has begun to arrive, or has arrived and is not dealt with.
    #[getter]
    fn is_arriving(&self) -> bool {
        self.is_arriving.load(Ordering::Relaxed)
    }

    /// Whether the dataset that is arriving is too large for memory.
    #[getter]
    fn is_large(&self) -> bool {
        self.is_large.load(Ordering::Relaxed)
    }

    /// Bytes that ever came.
    #[getter]
    fn total(&self) -> u64 {
        self.total.load(Ordering::Relaxed)
    }

    /// Whether a message has begun and is not whole.
    #[getter]
    fn is_within(&self) -> bool {
        self.lock().parser.is_within()
    }

    /// What of the last answer was not sent; all of it without a socket.
    fn unsent<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &std::mem::take(&mut locked(&self.answers).unsent))
    }

    /// The image that has arrived is dealt with, as it is also where more is read.
    fn answered(&self) {
        self.begin(&mut self.lock());
    }

    /// Keep no more of a dataset that is too large for memory; the request then tells `errno`.
    fn discard(&self, errno: i32) {
        let mut state = self.lock();
        if state.kept.is_large {
            state.kept.file = None;
            state.kept.errno = Some(errno);
        }
    }

    /// Close the duplicate of the socket, and the files of what is being written and of what may come next.
    fn close(&self, py: Python<'_>) {
        let mut state = self.lock();
        locked(&self.answers).socket = None;
        let kept = std::mem::take(&mut state.kept);
        let spare = state.incoming.as_mut().and_then(|one| one.spare.take());
        drop(state);
        // The system takes its time to free them.
        py.detach(|| drop((kept, spare)));
        self.is_arriving.store(false, Ordering::Relaxed);
        self.is_large.store(false, Ordering::Relaxed);
    }

    /// Read from the socket until something is whole.
    ///
    /// After an answer, and with a folder, the file of the next image may be opened already. Where some of the answer is
    /// unsent, nothing is read. A request gives `Received`, any other PDU its bytes, a closed connection empty bytes. None
    /// after `seconds` or 32 MiB, or as soon as `wake` can be read.
    ///
    /// Raises InvalidDicom for what breaks the protocol or a limit, and OSError.
    fn receive<'py>(
        &self,
        py: Python<'py>,
        wake: c_int,
        seconds: f64,
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        if locked(&self.answers).socket.is_none() {
            return Err(PyValueError::new_err("expected a receiver with a socket"));
        }
        if !(0.0..=3600.0).contains(&seconds) || wake < 0 {
            return Err(PyValueError::new_err(
                "expected an open descriptor and 0 to 3600 seconds",
            ));
        }
        let end = Instant::now() + Duration::from_secs_f64(seconds);
        self.run(py, || {
            // SAFETY: the caller keeps it open meanwhile.
            let wake = unsafe { BorrowedFd::borrow_raw(wake) };
            let mut guard = self.lock();
            let answers = locked(&self.answers);
            let Some(socket) = answers.socket.clone() else {
                return Ok(Outcome::Closed);
            };
            if !answers.unsent.is_empty() {
                return Ok(Outcome::Nothing);
            }
            drop(answers);
            self.read(&mut guard, socket.as_fd(), wake, end)
        })
    }

    /// The same for bytes that the caller has read; None where they make nothing whole.
    fn offer<'py>(&self, py: Python<'py>, data: &[u8]) -> PyResult<Option<Bound<'py, PyAny>>> {
        let mut left = data;
        self.run(py, || {
            let mut guard = self.lock();
            let state = &mut *guard;
            self.begin(state);
            while !left.is_empty() {
                let room = state.parser.room();
                let count = room.len().min(left.len());
                room[..count].copy_from_slice(&left[..count]);
                state.parser.filled(count)?;
                self.total.fetch_add(count as u64, Ordering::Relaxed);
                left = &left[count..];
            }
            Ok(self.step(state)?.unwrap_or(Outcome::Nothing))
        })
    }
}

impl Receiver {
    /// What was whole is dealt with.
    fn begin(&self, state: &mut State) {
        let has_more = state.parser.arriving().is_some();
        self.is_arriving.store(has_more, Ordering::Relaxed);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        locked(&self.state)
    }

    /// Run `work` without the interpreter.
    fn run<'py>(
        &self,
        py: Python<'py>,
        work: impl FnOnce() -> Result<Outcome> + Send,
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        match detached(py, work)? {
            Outcome::Nothing => Ok(None),
            Outcome::Closed => Ok(Some(PyBytes::new(py, b"").into_any())),
            Outcome::Pass(pdu) => Ok(Some(PyBytes::new(py, &pdu).into_any())),
            Outcome::Store(store, kept, dataset, digest) => {
                let received = Received {
                    digest,
                    store: *store,
                    dataset,
                    is_large: kept.is_large,
                    errno: kept.errno,
                    file: Mutex::new(kept.file),
                    answers: self.answers.clone(),
                    status: Mutex::new(None),
                };
                Ok(Some(Bound::new(py, received)?.into_any()))
            }
        }
    }

    fn read(
        &self,
        state: &mut State,
        socket: BorrowedFd<'_>,
        wake: BorrowedFd<'_>,
        end: Instant,
    ) -> Result<Outcome> {
        let before = self.total.load(Ordering::Relaxed);
        self.begin(state);
        loop {
            if let Some(outcome) = self.step(state)? {
                return Ok(outcome);
            }
            let outcome = recv(socket, state.parser.room(), RecvFlags::DONTWAIT);
            match outcome {
                Ok((_, count)) => {
                    state.parser.filled(count)?;
                    if count == 0 {
                        return Ok(Outcome::Closed);
                    }
                    let total = self.total.fetch_add(count as u64, Ordering::Relaxed);
                    if Instant::now() >= end || total - before > MOST_UNSEEN {
                        return Ok(self.step(state)?.unwrap_or(Outcome::Nothing));
                    }
                }
                Err(error) => {
                    state.parser.filled(0)?;
                    match error {
                        Errno::INTR => {}
                        Errno::AGAIN => {
                            // A sender with Nagle's algorithm waits for our acknowledgement.
                            let _ = set_tcp_quickack(socket, true);
                            // Another image is likely, and comes sooner to a file that is there.
                            if std::mem::take(&mut locked(&self.answers).is_new)
                                && let Some(incoming) = &mut state.incoming
                            {
                                incoming.prepare();
                            }
                            if !wait(socket, wake, end)? {
                                return Ok(Outcome::Nothing);
                            }
                        }
                        error => return Err(io(error)),
                    }
                }
            }
        }
    }

    /// What is whole by now; None where more bytes are needed.
    fn step(&self, state: &mut State) -> Result<Option<Outcome>> {
        let State {
            parser,
            incoming,
            kept,
            ..
        } = state;
        loop {
            let step = parser.step()?;
            let held = parser.arriving().map_or(0, |one| one.dataset.len());
            if parser.arriving().is_some() || matches!(step, core::Step::Store(_)) {
                self.is_arriving.store(true, Ordering::Relaxed);
            }
            self.arriving.store(held, Ordering::Relaxed);
            match step {
                core::Step::Hungry => {
                    if let Some(store) = parser.arriving()
                        && held > 0
                        && kept.write(incoming.as_mut(), store, false)
                        && self.kind == Kind::Blake3
                    {
                        parser.digest_along();
                    }
                    return Ok(None);
                }
                core::Step::Pass(pdu) => return Ok(Some(Outcome::Pass(pdu))),
                core::Step::Full => {
                    if let Some(store) = parser.arriving() {
                        kept.write(incoming.as_mut(), store, true);
                    }
                    kept.is_large = true;
                    self.is_large.store(true, Ordering::Relaxed);
                    drop(parser.take());
                    kept.written = 0;
                }
                core::Step::Store(mut store) => {
                    kept.write(incoming.as_mut(), &store, true);
                    if kept.is_large {
                        self.is_large.store(false, Ordering::Relaxed);
                        store.dataset = Bytes::default();
                    }
                    let dataset = Arc::new(std::mem::take(&mut store.dataset));
                    let digest = match store.digest.take() {
                        Some(digest) => Coming::known(self.kind, digest),
                        None => hashing::begin(self.kind, &dataset),
                    };
                    let kept = std::mem::take(kept);
                    return Ok(Some(Outcome::Store(store, kept, dataset, digest)));
                }
            }
        }
    }
}

/// Send as much as a socket takes at once; what is left. An error shows when it is read.
fn rest_of(socket: BorrowedFd<'_>, answer: &[u8]) -> Vec<u8> {
    if answer.is_empty() {
        return Vec::new();
    }
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    answer[send(socket, answer, flags).unwrap_or(0)..].to_vec()
}

/// Whether there is something to read before `end`; false also where `wake` can be read.
fn wait(socket: BorrowedFd<'_>, wake: BorrowedFd<'_>, end: Instant) -> Result<bool> {
    loop {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(false);
        }
        let mut both = [
            PollFd::from_borrowed_fd(socket, PollFlags::IN),
            PollFd::from_borrowed_fd(wake, PollFlags::IN),
        ];
        let timeout = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(3600),
            tv_nsec: left.subsec_nanos().into(),
        };
        match poll(&mut both, Some(&timeout)) {
            Ok(_) if !both[1].revents().is_empty() => return Ok(false),
            Ok(_) if !both[0].revents().is_empty() => return Ok(true),
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(io(error)),
        }
    }
}

fn io(error: Errno) -> Error {
    Error::io(Path::new("association"), error.into())
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A C-STORE request with its dataset.
#[pyclass(frozen, module = "dicomnode._core")]
pub struct Received {
    store: core::Store,
    dataset: Arc<Bytes>,
    /// Made while the image is routed and written.
    digest: Coming,
    is_large: bool,
    errno: Option<i32>,
    file: Mutex<Option<Growing>>,
    answers: Arc<Mutex<Answers>>,
    status: Mutex<Option<u16>>,
}

impl Received {
    /// Answer it, unless it was answered.
    pub fn give(&self, status: u16, comment: &str, offending: u32) {
        let mut given = locked(&self.status);
        if given.is_none() {
            *given = Some(status);
            let response = self.store.response(status, comment, offending);
            locked(&self.answers).give(&response);
        }
    }
}

#[pymethods]
impl Received {
    /// Presentation context ID.
    #[getter]
    fn context_id(&self) -> u8 {
        self.store.context
    }

    /// (0000,0002), whatever it may be.
    #[getter]
    fn sop_class_uid(&self) -> String {
        text(&self.store.sop_class_uid)
    }

    /// (0000,1000), whatever it may be.
    #[getter]
    fn sop_instance_uid(&self) -> String {
        text(&self.store.sop_instance_uid)
    }

    /// Bytes of the dataset.
    #[getter]
    fn size(&self) -> u64 {
        self.store.size
    }

    /// The digest of the dataset.
    #[getter]
    fn digest<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        let known = self.digest.now();
        let digest = known.unwrap_or_else(|| py.detach(|| self.digest.wait(&self.dataset)));
        PyBytes::new(py, &digest)
    }

    /// Whether the dataset was too large for memory, and is at best in its file.
    #[getter]
    fn is_large(&self) -> bool {
        self.is_large
    }

    /// The descriptor of its file, until `close`, and how many bytes it has to have. None without a file.
    #[getter]
    fn file(&self) -> Option<(RawFd, u64)> {
        let file = locked(&self.file);
        let file = file.as_ref()?;
        Some((file.as_fd().as_raw_fd(), file.start() + self.store.size))
    }

    /// Close its file; unless it was linked nothing is left of it.
    fn close(&self, py: Python<'_>) {
        let file = locked(&self.file).take();
        if let Some(file) = file
            && (self.is_large || file.has_name())
        {
            // The system takes its time to free it, or to delete the name.
            py.detach(|| drop(file));
        }
    }

    /// The number of the error because of which its file is not whole.
    #[getter]
    fn errno(&self) -> Option<i32> {
        self.errno
    }

    /// Answer it, unless it was answered; `unsent` of its `Receiver` has what the socket did not take at once.
    #[pyo3(signature = (status, comment = "", offending = 0))]
    fn answer(&self, py: Python<'_>, status: u16, comment: &str, offending: u32) {
        if self.status().is_none() {
            py.detach(|| self.give(status, comment, offending));
        }
    }

    /// The status that it was answered with; None where it was not answered.
    #[getter]
    fn status(&self) -> Option<u16> {
        *locked(&self.status)
    }

    /// The bytes of a C-STORE-RSP (PS3.7 section 9.3.1.2).
    #[pyo3(signature = (status, comment = "", offending = 0))]
    fn response<'py>(
        &self,
        py: Python<'py>,
        status: u16,
        comment: &str,
        offending: u32,
    ) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.store.response(status, comment, offending))
    }

    /// The first eight bytes of the dataset, as far as it is in memory.
    #[getter]
    fn head<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.dataset[..self.dataset.len().min(8)])
    }

    /// The bytes of the dataset.
    #[getter]
    fn data<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyMemoryView>> {
        PyMemoryView::from(slf.as_any())
    }

    /// # Safety
    /// Called by the interpreter with a view to fill.
    unsafe fn __getbuffer__(
        slf: Bound<'_, Self>,
        view: *mut ffi::Py_buffer,
        flags: c_int,
    ) -> PyResult<()> {
        let bytes = &slf.get().dataset;
        // SAFETY: the bytes live as long as the object that the view refers to and never change, and
        // the view is read-only.
        let failed = unsafe {
            ffi::PyBuffer_FillInfo(
                view,
                slf.as_ptr(),
                bytes.as_ptr().cast_mut().cast(),
                ffi::Py_ssize_t::try_from(bytes.len()).unwrap_or(ffi::Py_ssize_t::MAX),
                1,
                flags,
            )
        };
        if failed == 0 {
            Ok(())
        } else {
            Err(PyErr::fetch(slf.py()))
        }
    }
}

/// Give an open file of `size` bytes a name in a folder, also one without any; false where the name is taken.
///
/// With `flush` the file is durable before it has the name, and the name then, or it is not there. Raises
/// OSError, also where it has another size.
#[pyfunction]
pub fn link(
    py: Python<'_>,
    descriptor: c_int,
    size: u64,
    folder: PathBuf,
    name: &str,
    flush: bool,
) -> PyResult<bool> {
    if descriptor < 0 {
        return Err(PyValueError::new_err("expected an open descriptor"));
    }
    detached(py, || {
        // SAFETY: the caller keeps it open meanwhile.
        let opened = unsafe { BorrowedFd::borrow_raw(descriptor) };
        incoming::link(opened, size, &folder, name, flush)
            .map_err(|error| Error::io(Path::new(name), error))
    })
}

/// Preamble, `DICM` and File Meta Information (PS3.10 section 7.1) for a received dataset.
#[pyfunction]
#[pyo3(signature = (sop_class_uid, sop_instance_uid, transfer_syntax_uid, source_ae_title = ""))]
pub fn part10_prefix<'py>(
    py: Python<'py>,
    sop_class_uid: &str,
    sop_instance_uid: &str,
    transfer_syntax_uid: &str,
    source_ae_title: &str,
) -> Bound<'py, PyBytes> {
    let made = prefix(
        sop_class_uid,
        sop_instance_uid,
        transfer_syntax_uid,
        source_ae_title,
    );
    PyBytes::new(py, &made)
}
