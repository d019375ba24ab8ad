// Package agent collects build artefacts from many hosts.
package agent

import (
	"context"
	"errors"
	"fmt"
	"sync"
)

// ErrStopped is returned by Submit after Stop.
var ErrStopped = errors.New("agent: pool is stopped")

// Task is a unit of work. It has to return soon after its context is cancelled.
type Task func(ctx context.Context) error

// Pool runs tasks in a fixed number of goroutines.
type Pool struct {
	ctx    context.Context
	cancel context.CancelFunc
	tasks  chan Task
	wg     sync.WaitGroup

	// Held for reading while a task is sent, so that the channel is not closed meanwhile.
	closing sync.RWMutex
	stopped bool

	mu   sync.Mutex // guards errs and done
	errs []error
	done int
}

// NewPool starts workers goroutines, which end with Stop or when parent is done.
func NewPool(parent context.Context, workers, backlog int) *Pool {
	ctx, cancel := context.WithCancel(parent)
	p := &Pool{ctx: ctx, cancel: cancel, tasks: make(chan Task, backlog)}
	p.wg.Add(workers)
	for i := 0; i < workers; i++ {
		go p.work()
	}
	return p
}

func (p *Pool) work() {
	defer p.wg.Done()
	for task := range p.tasks {
		err := p.run(task)
		p.mu.Lock()
		p.done++
		if err != nil {
			p.errs = append(p.errs, err)
		}
		p.mu.Unlock()
	}
}

// run turns a panic of a task into an error, so that it ends no other task.
func (p *Pool) run(task Task) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("agent: task panicked: %v", r)
		}
	}()
	if err := p.ctx.Err(); err != nil {
		return err
	}
	return task(p.ctx)
}

// Submit queues a task, and waits while the backlog is full.
func (p *Pool) Submit(ctx context.Context, task Task) error {
	p.closing.RLock()
	defer p.closing.RUnlock()
	if p.stopped {
		return ErrStopped
	}
	select {
	case p.tasks <- task:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-p.ctx.Done():
		return p.ctx.Err()
	}
}

// Stop refuses new tasks, waits for those that were queued and returns their errors, joined.
func (p *Pool) Stop() error {
	p.close()
	p.wg.Wait()
	p.cancel()
	p.mu.Lock()
	defer p.mu.Unlock()
	return errors.Join(p.errs...)
}

func (p *Pool) close() {
	p.closing.Lock()
	defer p.closing.Unlock()
	if !p.stopped {
		p.stopped = true
		close(p.tasks)
	}
}
