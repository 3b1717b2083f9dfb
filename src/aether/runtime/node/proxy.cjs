// Loaded into every Node of a cell with a network (NODE_OPTIONS=--require): makes http, https and fetch use the proxy
// that HTTPS_PROXY names. Nothing is done where Node does it by itself (--use-env-proxy: 22.21, 24) or where the
// program brings an agent or a dispatcher of its own.
'use strict';
const { env } = process;
const http = require('node:http');
const https = require('node:https');
const tls = require('node:tls');

const plain = new http.Agent(); // the proxy itself is reached directly
const proxy = env.HTTPS_PROXY ? new URL(env.HTTPS_PROXY) : null;
const direct = new Set((env.NO_PROXY || '').split(',').map((name) => name.trim().toLowerCase()));
const DISPATCHER = Symbol.for('undici.globalDispatcher.1'); // where fetch looks, of Node's own undici or another one

const bare = (host) => host.replace(/^\[|\]$/g, '');
const skips = (host) => direct.has(bare(host).toLowerCase());
const authority = (host, port) => `${bare(host).includes(':') ? `[${bare(host)}]` : host}:${port}`;

// A connection through the proxy: done(error) or done(null, socket).
function tunnel(host, port, done) {
  const target = authority(host, port);
  const asked = http.request({
    host: proxy.hostname, port: proxy.port, agent: plain, method: 'CONNECT', path: target, headers: { Host: target },
  });
  asked.once('connect', (answer, socket) => {
    if (answer.statusCode === 200) return done(null, socket);
    socket.destroy();
    return done(new Error(`the proxy refused ${target}: ${answer.statusCode} ${answer.statusMessage}`));
  });
  asked.once('error', done);
  asked.end();
}

class HttpsAgent extends https.Agent {
  createConnection(options, done) {
    if (skips(options.host)) return super.createConnection(options, done);
    tunnel(options.host, options.port, (error, socket) => {
      if (error) done(error);
      else done(null, super.createConnection({ ...options, socket }));
    });
    return undefined;
  }
}

class HttpAgent extends http.Agent {
  addRequest(request, options, ...more) {
    if (skips(options.host) || options.socketPath) return super.addRequest(request, options, ...more);
    request.path = `http://${authority(options.host, options.port)}${request.path}`; // RFC 9112, 3.2.2: absolute-form
    return super.addRequest(request, { ...options, host: proxy.hostname, port: proxy.port }, ...more);
  }
}

function connect(options, done) {
  const port = options.port || (options.protocol === 'https:' ? 443 : 80);
  const secure = (socket) => {
    const servername = options.servername || undefined;
    const secured = tls.connect({ ALPNProtocols: ['http/1.1'], servername, host: bare(options.hostname), port, socket });
    secured.once('secureConnect', () => done(null, secured)).once('error', done);
  };
  if (options.protocol === 'https:' && !skips(options.hostname)) {
    tunnel(options.hostname, port, (error, socket) => (error ? done(error) : secure(socket)));
    return;
  }
  const socket = require('node:net').connect({ host: bare(options.hostname), port });
  socket.once('connect', () => (options.protocol === 'https:' ? secure(socket) : done(null, socket)));
  socket.once('error', done);
}

// fetch's parts are loaded when they are first touched, so that a program without fetch does not wait for them.
function dispatchByProxy() {
  if (globalThis[DISPATCHER] !== undefined) return;
  void globalThis.Response;
  const Agent = globalThis[DISPATCHER]?.constructor;
  if (Agent === undefined) return;
  globalThis[DISPATCHER] = new (class extends Agent {
    dispatch(options, handler) {
      const origin = new URL(options.origin);
      if (origin.protocol === 'https:' || skips(origin.hostname)) return super.dispatch(options, handler);
      const headers = { ...options.headers, host: origin.host };
      return super.dispatch({ ...options, origin: proxy.origin, path: origin.origin + options.path, headers }, handler);
    }
  })({ connect });
}

if (proxy && !process.allowedNodeEnvironmentFlags.has('--use-env-proxy')) {
  http.globalAgent = new HttpAgent({ keepAlive: true, timeout: 5000 });
  https.globalAgent = new HttpsAgent({ keepAlive: true, timeout: 5000 });
  const { fetch } = globalThis;
  if (fetch) {
    globalThis.fetch = function (resource, options) {
      dispatchByProxy();
      return fetch(resource, options);
    };
  }
}
