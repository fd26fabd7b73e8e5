(** A product of linear layers: the first order, and the whole remainder

    Claim.  For L linear layers W_0, …, W_(L-1), updated by t dW_0, …, t dW_(L-1),

      (W_(L-1) + t dW_(L-1)) … (W_0 + t dW_0)
        = W_(L-1) … W_0  +  t T_L  +  t^2 Q_L ,

      T_(k+1) = dW_k W_(k-1) … W_0 + W_k T_k            (the JVP recursion)
      Q_(k+1) = W_k Q_k + dW_k (T_k + t Q_k)            (all that it leaves out).

    So for one linear layer a weight update is an activation shift exactly, and in
    a composition the remainder starts at t^2.

    Assumptions.  None: algebra over any commutative ring, any depth, any t.

    Not said here.  Layers are square and linear.  For nonlinear blocks see
    superposition_derivative.v (first order) and network_remainder.v (size of the
    remainder). *)
From mathcomp Require Import all_ssreflect all_algebra.
From Equiv Require Import basics.
Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.
Import GRing.Theory.
Local Open Scope ring_scope.

Section OneLayer.
Variables (R : comRingType) (m n : nat).
Implicit Types (W dW : 'M[R]_(m, n)) (h dh : 'cV[R]_n).

(** Weight and input moved together leave exactly dW dh; with dh = 0 nothing. *)
Theorem linear_cross_term W dW h dh :
  (W + dW) *m (h + dh) = W *m h + (dW *m h + W *m dh) + dW *m dh.
Proof. by rewrite mulmxDr !mulmxDl !addrA. Qed.
End OneLayer.

Section Chain.
Variables (R : comRingType) (d : nat).
Variables (W dW : nat -> 'M[R]_d) (t : R).

(** (B + t dB)(A + t dA) = B A + t (dB A + B dA) + t^2 dB dA *)
Lemma two_layers (A B dA dB : 'M[R]_d) :
  (B + t *: dB) *m (A + t *: dA)
    = B *m A + t *: (dB *m A + B *m dA) + t ^+ 2 *: (dB *m dA).
Proof.
by rewrite mulmxDr !mulmxDl -!scalemxAl -!scalemxAr scalerA scalerDr !addrA.
Qed.

(** V_(n-1) … V_0, the product of the first n layers. *)
Fixpoint chain (V : nat -> 'M[R]_d) n : 'M[R]_d :=
  if n is k.+1 then V k *m chain V k else 1%:M.

(** T_n: the derivative of the product. *)
Fixpoint chain_jvp n : 'M[R]_d :=
  if n is k.+1 then dW k *m chain W k + W k *m chain_jvp k else 0.

(** Q_n: the remainder divided by t^2. *)
Fixpoint chain_rem n : 'M[R]_d :=
  if n is k.+1 then W k *m chain_rem k + dW k *m (chain_jvp k + t *: chain_rem k)
  else 0.

(** tuned product = base product + t T + t^2 Q. *)
Theorem chain_expansion n :
  chain (fun k => W k + t *: dW k) n
    = chain W n + t *: chain_jvp n + t ^+ 2 *: chain_rem n.
Proof.
elim: n => [|n IHn] /=; first by rewrite !scaler0 !addr0.
have -> : chain (fun k => W k + t *: dW k) n
        = chain W n + t *: (chain_jvp n + t *: chain_rem n).
  by rewrite IHn scalerDr scalerA addrA.
rewrite two_layers mulmxDr -scalemxAr addrA.
by rewrite !(scalerDr t) scalerDr scalerA !addrA.
Qed.
End Chain.
