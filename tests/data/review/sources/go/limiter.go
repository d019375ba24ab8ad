package agent

import (
	"math"
	"sync"
	"time"
)

// Limiter is a token bucket per key: rate tokens a second, at most burst of them saved up.
type Limiter struct {
	rate  float64
	burst float64
	now   func() time.Time

	mu      sync.Mutex
	buckets map[string]*bucket
}

type bucket struct {
	tokens  float64
	updated time.Time
}

// NewLimiter makes a limiter whose buckets are full at first.
func NewLimiter(rate float64, burst int) *Limiter {
	return &Limiter{
		rate:    rate,
		burst:   float64(burst),
		now:     time.Now,
		buckets: make(map[string]*bucket),
	}
}

// refill adds the tokens for the time that has passed. The caller holds the lock.
func (l *Limiter) refill(key string) *bucket {
	now := l.now()
	b, ok := l.buckets[key]
	if !ok {
		b = &bucket{tokens: l.burst, updated: now}
		l.buckets[key] = b
		return b
	}
	elapsed := now.Sub(b.updated).Seconds()
	b.tokens = math.Min(l.burst, b.tokens+elapsed*l.rate)
	b.updated = now
	return b
}

// Allow takes a token of key if there is one.
func (l *Limiter) Allow(key string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	b := l.refill(key)
	if b.tokens < 1 {
		return false
	}
	b.tokens--
	return true
}

// RetryAfter says how long key has to wait for its next token.
func (l *Limiter) RetryAfter(key string) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	missing := 1 - l.refill(key).tokens
	if missing <= 0 {
		return 0
	}
	return time.Duration(math.Ceil(missing / l.rate * float64(time.Second)))
}

// Prune forgets the buckets that have been full for a while, as new ones would be the same.
// It returns how many are left.
func (l *Limiter) Prune() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.now()
	for key, b := range l.buckets {
		if b.tokens+now.Sub(b.updated).Seconds()*l.rate >= l.burst {
			delete(l.buckets, key)
		}
	}
	return len(l.buckets)
}
