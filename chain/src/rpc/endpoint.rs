use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use alloy::primitives::{Address, B256, Bytes, U64, U256};
use alloy::rpc::types::Header;
use kms_protocol::wire::webhook::bounded_reason;
use reqwest::{Client, StatusCode, Url};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::json;
use serde_json::value::RawValue;
use tokio::sync::OnceCell;
use tokio::time::timeout;

use crate::revert::Revert;
use crate::rpc::{Head, Log, Receipt};
use crate::{Error, Result, http};

/// What one request may cost.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Time for one request, from connecting to the last byte.
    pub deadline: Duration,
    /// Bytes of one answer.
    pub answer: usize,
}

impl Default for Limits {
    /// 10 s, and 8 MiB: a wide `eth_getLogs` fits, an endless stream does not.
    fn default() -> Self {
        Self { deadline: Duration::from_secs(10), answer: 8 << 20 }
    }
}

/// One JSON-RPC endpoint.
pub struct Endpoint {
    url: Url,
    name: String,
    client: Client,
    limits: Limits,
    next_id: AtomicU64,
    chain_id: OnceCell<u64>,
}

#[derive(Serialize)]
struct Request<'a, P> {
    jsonrpc: &'static str,
    id: u64,
    method: &'a str,
    params: P,
}

#[derive(Deserialize)]
struct Answer<'a> {
    id: Option<u64>,
    #[serde(borrow, default)]
    result: Option<&'a RawValue>,
    error: Option<RpcError>,
}

#[derive(Deserialize)]
struct RpcError {
    #[serde(default)]
    code: i64,
    #[serde(default)]
    message: String,
    data: Option<serde_json::Value>,
}

impl Endpoint {
    /// An endpoint at an `http` or `https` address. No connection is made yet.
    ///
    /// # Errors
    /// [`Error::EndpointAddress`], [`Error::HttpClient`].
    pub fn new(address: &str, limits: Limits) -> Result<Self> {
        let parsed = Url::parse(address).ok().filter(Url::has_host);
        let Some(url) = parsed else {
            // Not even its beginning is shown: it could be a key pasted into the wrong place.
            let name = "(not a URL)".to_owned();
            return Err(Error::EndpointAddress { name });
        };
        if !matches!(url.scheme(), "http" | "https") {
            let name = format!("{}://{}", url.scheme(), url.host_str().unwrap_or_default());
            return Err(Error::EndpointAddress { name });
        }
        let port = url.port().map(|it| format!(":{it}")).unwrap_or_default();
        let name = format!("{}://{}{port}", url.scheme(), url.host_str().unwrap_or_default());
        let client = http::client(limits.deadline).map_err(Error::HttpClient)?;
        Ok(Self { url, name, client, limits, next_id: AtomicU64::new(1), chain_id: OnceCell::new() })
    }

    /// Scheme, host and port: the part that may be shown.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Asks once. Cancel safe: a dropped request is only not answered.
    ///
    /// # Errors
    /// Everything an endpoint can do wrong, see [`Error`].
    pub async fn request<R: DeserializeOwned>(
        &self,
        method: &'static str,
        params: impl Serialize,
    ) -> Result<R> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let request = Request { jsonrpc: "2.0", id, method, params };
        let malformed = |problem: String| Error::Malformed { endpoint: self.name.clone(), method, problem };
        let body = serde_json::to_vec(&request).map_err(|error| malformed(error.to_string()))?;
        let deadline = self.limits.deadline;
        let (status, answer) = timeout(deadline, self.exchange(method, body))
            .await
            .map_err(|_| Error::NoAnswer { endpoint: self.name.clone(), method, after: deadline })??;
        let parsed: Result<Answer<'_>, _> = serde_json::from_slice(&answer);
        match parsed {
            Ok(Answer { error: Some(error), .. }) => Err(self.rpc_error(method, error)),
            _ if !status.is_success() => Err(self.http_error(method, status, &answer)),
            Ok(Answer { id: Some(other), .. }) if other != id => {
                Err(malformed(format!("answer {other} to request {id}")))
            }
            Ok(Answer { result, .. }) => {
                let result = result.map_or("null", RawValue::get);
                serde_json::from_str(result).map_err(|error| malformed(bounded_reason(&error.to_string())))
            }
            Err(error) => Err(malformed(format!("not JSON-RPC: {error}"))),
        }
    }

    async fn exchange(&self, method: &'static str, body: Vec<u8>) -> Result<(StatusCode, Vec<u8>)> {
        let unreachable = |source: reqwest::Error| Error::Unreachable {
            endpoint: self.name.clone(),
            method,
            source: source.without_url(),
        };
        let request =
            self.client.post(self.url.clone()).header("content-type", "application/json").body(body);
        let response = request.send().await.map_err(unreachable)?;
        let status = response.status();
        let limit = self.limits.answer;
        match http::body(response, limit).await.map_err(unreachable)? {
            Some(answer) => Ok((status, answer)),
            None => Err(Error::TooLarge { endpoint: self.name.clone(), method, limit }),
        }
    }

    fn http_error(&self, method: &'static str, status: StatusCode, body: &[u8]) -> Error {
        let endpoint = self.name.clone();
        match status {
            StatusCode::TOO_MANY_REQUESTS => Error::RateLimited { endpoint, method },
            _ => Error::HttpStatus {
                endpoint,
                method,
                status: status.as_u16(),
                excerpt: bounded_reason(&String::from_utf8_lossy(&body[..body.len().min(200)])),
            },
        }
    }

    /// The codes are those of JSON-RPC 2.0, EIP-1474 and geth; the texts are what nodes and providers say.
    fn rpc_error(&self, method: &'static str, error: RpcError) -> Error {
        let endpoint = self.name.clone();
        let message = bounded_reason(&error.message);
        let said = message.to_lowercase();
        let says = |words: &[&str]| words.iter().any(|it| said.contains(it));
        let executes = matches!(method, "eth_call" | "eth_estimateGas");
        if executes && (error.code == 3 || says(&["revert"])) {
            return Error::Reverted { what: method.to_owned(), revert: revert_of(error.data, &message) };
        }
        if error.code == -32601
            || says(&["method not found", "does not exist/is not available", "method not supported"])
        {
            return Error::MethodMissing { endpoint, method };
        }
        if matches!(error.code, -32005 | 429) || says(&["rate limit", "too many requests"]) {
            return Error::RateLimited { endpoint, method };
        }
        let missing = [
            "header not found",
            "missing trie node",
            "unknown block",
            "block not found",
            "state is not available",
        ];
        if says(&missing) || says(&["blockoutofrange", "block out of range", "historical state", "pruned"]) {
            return Error::StateMissing { endpoint, method, message };
        }
        Error::Rpc { endpoint, method, code: error.code, message }
    }

    /// The chain's id, asked once.
    ///
    /// # Errors
    /// See [`Endpoint::request`].
    pub async fn chain_id(&self) -> Result<u64> {
        let asked = self.chain_id.get_or_try_init(|| async {
            let id: U64 = self.request("eth_chainId", json!([])).await?;
            Ok(id.to())
        });
        asked.await.copied()
    }

    /// The newest block.
    ///
    /// # Errors
    /// See [`Endpoint::request`].
    pub async fn head(&self) -> Result<Head> {
        self.block("latest").await
    }

    /// A block by number (hex) or tag.
    ///
    /// # Errors
    /// [`Error::StateMissing`] when it is not there; see [`Endpoint::request`].
    pub async fn block(&self, which: &str) -> Result<Head> {
        let method = "eth_getBlockByNumber";
        let head: Option<Head> = self.request(method, json!([which, false])).await?;
        head.ok_or_else(|| Error::StateMissing {
            endpoint: self.name.clone(),
            method,
            message: format!("no block {which}"),
        })
    }

    /// The block with this hash. The hash is computed from the header that comes, so the endpoint is not believed.
    ///
    /// # Errors
    /// [`Error::Proof`] when the header has another hash; [`Error::StateMissing`] when it is not there; see
    /// [`Endpoint::request`].
    pub async fn block_with_hash(&self, hash: B256) -> Result<Head> {
        let method = "eth_getBlockByHash";
        let header: Option<Header> = self.request(method, json!([hash, false])).await?;
        let Some(Header { inner: header, .. }) = header else {
            let message = format!("no block {hash}");
            return Err(Error::StateMissing { endpoint: self.name.clone(), method, message });
        };
        let actual = header.hash_slow();
        if actual != hash {
            return Err(Error::Proof {
                what: format!("the header of block {hash}"),
                endpoint: self.name.clone(),
                problem: format!("the header that came has the hash {actual}"),
            });
        }
        Ok(Head {
            number: U64::from(header.number),
            hash,
            state_root: header.state_root,
            timestamp: U64::from(header.timestamp),
            base_fee_per_gas: header.base_fee_per_gas.map(U256::from),
        })
    }

    /// Runs a call on the state of `block` without sending it.
    ///
    /// # Errors
    /// [`Error::Reverted`], and see [`Endpoint::request`].
    pub async fn call(
        &self,
        to: Option<Address>,
        from: Option<Address>,
        data: &Bytes,
        block: u64,
    ) -> Result<Bytes> {
        let mut call = json!({ "data": data });
        if let Some(to) = to {
            call["to"] = json!(to);
        }
        if let Some(from) = from {
            call["from"] = json!(from);
        }
        self.request("eth_call", json!([call, U64::from(block)])).await
    }

    /// The code at an address.
    ///
    /// # Errors
    /// See [`Endpoint::request`].
    pub async fn code(&self, address: Address, block: u64) -> Result<Bytes> {
        self.request("eth_getCode", json!([address, U64::from(block)])).await
    }

    /// One storage slot of a contract.
    ///
    /// # Errors
    /// See [`Endpoint::request`].
    pub async fn storage(&self, address: Address, slot: B256, block: u64) -> Result<B256> {
        let word: U256 = self.request("eth_getStorageAt", json!([address, slot, U64::from(block)])).await?;
        Ok(word.into())
    }

    /// What became of a transaction; `None` while it is not in a block.
    ///
    /// # Errors
    /// See [`Endpoint::request`].
    pub async fn receipt(&self, hash: B256) -> Result<Option<Receipt>> {
        self.request("eth_getTransactionReceipt", json!([hash])).await
    }

    /// The next nonce of an account, at a block number (hex) or a tag.
    ///
    /// # Errors
    /// See [`Endpoint::request`].
    pub async fn nonce(&self, account: Address, at: &str) -> Result<u64> {
        let nonce: U64 = self.request("eth_getTransactionCount", json!([account, at])).await?;
        Ok(nonce.to())
    }

    /// The events of some contracts in a range of blocks, both ends included.
    ///
    /// # Errors
    /// See [`Endpoint::request`].
    pub async fn logs(&self, addresses: &[Address], from: u64, to: u64) -> Result<Vec<Log>> {
        let filter = json!({ "address": addresses, "fromBlock": U64::from(from), "toBlock": U64::from(to) });
        self.request("eth_getLogs", json!([filter])).await
    }
}

/// The data of a revert, wherever this node puts it.
fn revert_of(data: Option<serde_json::Value>, message: &str) -> Revert {
    let found = match &data {
        Some(serde_json::Value::String(text)) => Some(text.as_str()),
        Some(serde_json::Value::Object(map)) => map.get("data").and_then(|it| it.as_str()),
        _ => None,
    };
    let digits = found.map(|text| text.strip_prefix("Reverted ").unwrap_or(text).trim_start_matches("0x"));
    match digits.and_then(|digits| hex::decode(digits).ok()) {
        Some(bytes) => Revert::decode(bytes.into()),
        None => match message.split_once("reverted: ") {
            Some((_, reason)) => Revert::Reason(reason.to_owned()),
            None => Revert::Data(Bytes::new()),
        },
    }
}
