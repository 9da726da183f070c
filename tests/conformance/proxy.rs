//! An HTTP proxy that can be told to do what networks and stores do at times.
//!
//! One request a connection, whose answer ends with the connection.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};
use std::time::Duration;

/// What the proxy is to do. Counts are of requests still to be met.
#[derive(Default)]
pub struct Plan {
    /// Takes the condition out of requests that create.
    pub ignore_conditions: AtomicBool,
    /// Answers 501 to requests that create.
    pub refuse_conditions: AtomicBool,
    /// Makes plain writes look like those by a signed URL, the only ones of this protocol that
    /// fake-gcs-server takes, and gives their answers the ETag that Google's have.
    pub as_signed_url: AtomicBool,
    /// Writes whose answer gets lost, after the store has taken them.
    pub lose_answers: AtomicU32,
    /// Writes of which the store gets only half.
    pub cut_bodies: AtomicU32,
    /// Requests answered with 503 by a busy store.
    pub busy: AtomicU32,
    /// Reads whose answer stops in the middle, with the connection open.
    pub stall_answers: AtomicU32,
    /// Requests that came.
    pub requests: AtomicU32,
}

pub struct Proxy {
    pub port: u16,
    pub plan: Arc<Plan>,
}

struct Request {
    head: Vec<String>,
    body: Vec<u8>,
}

impl Request {
    fn method(&self) -> &str {
        self.head[0].split(' ').next().unwrap()
    }

    fn without(&mut self, header: &str) -> bool {
        let prefix = format!("{header}:");
        let before = self.head.len();
        self.head.retain(|line| !line.to_ascii_lowercase().starts_with(&prefix));
        self.head.len() < before
    }
}

impl Proxy {
    /// Starts one in front of a port of this machine.
    pub fn start(upstream: u16) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let plan = Arc::new(Plan::default());
        let shared = plan.clone();
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let plan = shared.clone();
                std::thread::spawn(move || serve(client, upstream, &plan));
            }
        });
        Proxy { port, plan }
    }
}

/// Whether this one is to be met: takes it off the count.
fn take(count: &AtomicU32) -> bool {
    count.fetch_update(SeqCst, SeqCst, |left| left.checked_sub(1)).is_ok()
}

fn read_head(from: &mut TcpStream) -> Option<(Vec<String>, Vec<u8>)> {
    let mut buffer = Vec::new();
    let mut chunk = [0; 64 << 10];
    loop {
        if let Some(end) = buffer.windows(4).position(|window| window == b"\r\n\r\n") {
            let head = String::from_utf8_lossy(&buffer[..end]).into_owned();
            let head = head.split("\r\n").map(str::to_owned).collect();
            return Some((head, buffer.split_off(end + 4)));
        }
        match from.read(&mut chunk) {
            Ok(0) | Err(_) => return None,
            Ok(count) => buffer.extend_from_slice(&chunk[..count]),
        }
    }
}

fn read_request(client: &mut TcpStream) -> Option<Request> {
    let (head, mut body) = read_head(client)?;
    let length = head.iter().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>().ok())?
    });
    let have = body.len();
    body.resize(length.unwrap_or(0).max(have), 0);
    client.read_exact(&mut body[have..]).ok()?;
    Some(Request { head, body })
}

fn serve(mut client: TcpStream, upstream: u16, plan: &Plan) {
    client.set_read_timeout(Some(Duration::from_secs(120))).unwrap();
    let Some(mut request) = read_request(&mut client) else { return };
    plan.requests.fetch_add(1, SeqCst);
    let is_write = request.method() == "PUT" || request.method() == "POST";
    if take(&plan.busy) {
        let body = "<?xml version=\"1.0\"?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>";
        return answer(&mut client, "503 Service Unavailable", body);
    }
    let is_conditional =
        request.head.iter().any(|line| line.to_ascii_lowercase().starts_with("if-none-match:"));
    if is_conditional && plan.refuse_conditions.load(SeqCst) {
        let body = "<?xml version=\"1.0\"?><Error><Code>NotImplemented</Code><Message>A header you provided implies functionality that is not implemented.</Message></Error>";
        return answer(&mut client, "501 Not Implemented", body);
    }
    if is_conditional && plan.ignore_conditions.load(SeqCst) {
        request.without("if-none-match");
    }
    let as_signed_url = request.method() == "PUT" && plan.as_signed_url.load(SeqCst);
    if as_signed_url {
        let signed = "?X-Goog-Algorithm=GOOG4-RSA-SHA256 HTTP/1.1";
        request.head[0] = request.head[0].replace(" HTTP/1.1", signed);
    }
    request.without("connection");
    let Ok(mut server) = TcpStream::connect(("127.0.0.1", upstream)) else { return };
    let head = format!("{}\r\nConnection: close\r\n\r\n", request.head.join("\r\n"));
    server.write_all(head.as_bytes()).unwrap();
    if is_write && !request.body.is_empty() && take(&plan.cut_bodies) {
        let _ = server.write_all(&request.body[..request.body.len() / 2]);
        let _ = server.shutdown(Shutdown::Both);
        return;
    }
    if server.write_all(&request.body).is_err() {
        return;
    }
    if is_write && take(&plan.lose_answers) {
        // The store has taken it once it answers.
        let _ = read_head(&mut server);
        return;
    }
    let stalls = request.method() == "GET" && take(&plan.stall_answers);
    relay(&mut server, &mut client, stalls, as_signed_url);
}

fn answer(client: &mut TcpStream, status: &str, body: &str) {
    let length = body.len();
    let text = format!(
        "HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
    );
    let _ = client.write_all(text.as_bytes());
}

fn relay(server: &mut TcpStream, client: &mut TcpStream, stalls: bool, add_etag: bool) {
    let Some((mut head, body)) = read_head(server) else { return };
    head.retain(|line| !line.to_ascii_lowercase().starts_with("connection:"));
    if add_etag {
        head.push("ETag: \"of-the-proxy\"".to_owned());
    }
    let head = format!("{}\r\nConnection: close\r\n\r\n", head.join("\r\n"));
    if client.write_all(head.as_bytes()).is_err() {
        return;
    }
    if stalls {
        let _ = client.write_all(&body[..body.len().min(10)]);
        // Until the client gives up.
        let _ = client.read(&mut [0]);
        return;
    }
    let _ = client.write_all(&body);
    let _ = std::io::copy(server, client);
}

/// A listener that takes connections and never says anything.
pub struct Silence {
    pub port: u16,
}

impl Silence {
    pub fn start() -> Silence {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        std::thread::spawn(move || {
            let taken: Vec<TcpStream> = listener.incoming().flatten().collect();
            drop(taken);
        });
        Silence { port }
    }
}
